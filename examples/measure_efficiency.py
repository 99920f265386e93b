"""Measure what a checkpoint costs, compared with its base and donor. Run build_checkpoint.py first."""

from model_preparation import measure_efficiency

found = measure_efficiency("example_output/checkpoint", contexts=[32], results_dir="example_output/evaluations")
for model in found["models"]:
    print(f"{model['name']}: a cache of {model['contexts'][0]['cache_bytes']:,} bytes after 32 tokens")
