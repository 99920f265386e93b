"""Runs many builds or evaluations, one after the other or at once on Ray; also runs one search on many Ray workers."""
