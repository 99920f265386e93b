"""Check that a checkpoint has not changed since it was built. Run build_checkpoint.py first."""

from model_preparation import verify_checkpoint

faults = verify_checkpoint("example_output/checkpoint", base="tiny_llamba", llama_layers_dir="example_output/layers")
for fault in faults:
    print(fault)
print(f"{len(faults)} faults")
