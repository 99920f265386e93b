"""Find the best layer to replace. Run extract_layers.py first."""

from model_preparation import search_layers

found = search_layers(
    base="tiny_llamba",
    llama_layers_dir="example_output/layers",
    tasks=("embedded_recall",),
    limit=10,
    batch_size=10,
    method="singles",
    output_dir="example_output/search",
    overwrite=True,
)
best = found["final_results"][0]
print(f"Layer {best['layers'][0]} scores {best['fitness']:.3f}; without it the base scores {found['base_score']:.3f}")
