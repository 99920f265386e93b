"""Evaluations beside each other: their common questions, what separates them from chance, tables, plots, a report."""
