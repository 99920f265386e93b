"""Compare evaluations question by question: statistics, tables, plots, a report."""
