"""Finds local folders for names and hub ids, uploads checkpoints, and finds their licences."""
