"""Measure how good a checkpoint is: the texts it generates, and the questions it answers."""
