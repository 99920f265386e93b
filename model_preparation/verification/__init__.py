"""Whether a checkpoint is what was built: files, tensors, base and donor."""
