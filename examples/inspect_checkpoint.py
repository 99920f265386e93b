"""List the tensors of one layer. Run build_checkpoint.py first."""

from model_preparation import inspect_checkpoint

for line in inspect_checkpoint("example_output/checkpoint", "backbone.layers.4.*"):
    print(line)
