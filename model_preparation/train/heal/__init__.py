"""Healing: trains a grafted checkpoint a little, on text or on the predictions of a teacher."""
