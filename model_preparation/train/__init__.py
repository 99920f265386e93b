"""Training that can be stopped and resumed anywhere."""
