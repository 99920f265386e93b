"""Training of grafted models: healing, with exact stop and resume."""
