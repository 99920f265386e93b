"""Which layers to graft: combinations scored on activations that they share, and methods that choose among them."""
