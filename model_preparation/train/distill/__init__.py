"""Distilling: a Llamba base is made from any donor."""
