"""Checkpoints on their way to a hub: licence, card, upload."""
