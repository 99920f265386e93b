"""Make a base from a Llama, and train the mixers of two layers."""

from model_preparation import distill_llamba_base

summary = distill_llamba_base(
    "tiny_llama",
    "example_output/distilled",
    "self",
    tokens=256,
    sequence_length=32,
    steps_per_layer=2,
    batch_size=2,
    layers=[0, 1],
    overwrite=True,
    restart=True,
)
print(f"The base is in example_output/distilled. Perplexities: {summary['perplexity']}")
