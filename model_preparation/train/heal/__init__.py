"""Healing: trains a grafted checkpoint on text, or against its donor."""
