"""Build a checkpoint again from its checkpoint_info.json. Run extract_layers.py and build_checkpoint.py first."""

from model_preparation.checkpoint.rebuild import rebuild_checkpoint

recipe = "example_output/checkpoint/checkpoint_info.json"
notes = rebuild_checkpoint(recipe, "example_output/rebuilt", "example_output/layers", overwrite=True)
print(notes or "Every byte is the same, except the time of creation")
