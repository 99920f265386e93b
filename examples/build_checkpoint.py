"""Replace two layers of a base by the donor's layers. Run extract_layers.py first."""

from model_preparation import build_checkpoint

info = build_checkpoint(
    "tiny_llamba",
    [4, 10],
    "example_output/layers",
    "example_output/checkpoint",
    description="the best pair of layers",
    overwrite=True,
)
print(f"Layers {info['replaced_layers']} of {info['total_layers']} are the donor's")
