"""A look inside files of tensors, without loading them and without running code."""
