"""Which layers to graft: methods choose combinations of layers, which are scored together and share hidden states."""
