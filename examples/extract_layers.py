"""Write each layer of a donor into its own file."""

from model_preparation import extract_layers

metadata = extract_layers("tiny_llama", "example_output/layers", overwrite=True)
print(f"{len(metadata['layers'])} layers of {metadata['num_heads']} heads are in example_output/layers")
