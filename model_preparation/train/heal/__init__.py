"""Healing: a grafted checkpoint is trained on text or against its donor."""
