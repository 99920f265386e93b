"""Evaluations compared question by question: what is more than chance, tables, plots, a report."""
