"""Load a checkpoint, and compute with it. Run build_checkpoint.py first."""

import torch

from model_preparation import load_checkpoint

model, tokenizer = load_checkpoint("example_output/checkpoint", device="cpu")
inputs = tokenizer("Mia likes quinces . Rosa likes eggs . Mia likes", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits  # (1, tokens, vocabulary)
print(f"The likeliest next word is {tokenizer.decode(logits[0, -1].argmax())}")
