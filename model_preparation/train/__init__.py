"""Healing and distilling. A run can be stopped at any time, and the same command resumes it."""
