"""From a donor, a base and a list of layers to a checkpoint folder: sources, layer_store, graft, checkpoint."""
