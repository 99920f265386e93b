"""Runs many builds or evaluations, one after the other or at once on Ray. Also scores a search's candidates on Ray."""
