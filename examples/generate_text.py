"""Let a checkpoint continue a text. Run build_checkpoint.py first."""

from model_preparation import load_checkpoint
from model_preparation.evaluation.generation import generate_text

model, tokenizer = load_checkpoint("example_output/checkpoint")
written = generate_text(model, tokenizer, "Mia likes quinces . Rosa likes eggs . Mia likes", max_new_tokens=1)
print(f"{written.prompt} {written.text}")
