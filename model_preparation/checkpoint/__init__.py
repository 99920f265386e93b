"""Checkpoints: extract layers, build, rebuild, load, verify, inspect and share."""
