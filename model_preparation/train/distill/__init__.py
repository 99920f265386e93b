"""Distilling: makes a Llamba base from any donor."""
