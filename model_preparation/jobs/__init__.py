"""Runs many builds, evaluations or searches: one after the other, or at once on Ray."""
