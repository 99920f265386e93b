"""Train a checkpoint a little on text. Run build_checkpoint.py first."""

from pathlib import Path

from model_preparation import heal_checkpoint

Path("example_output/text.txt").write_text("Mia likes quinces . Rosa likes eggs . Mia likes quinces . " * 100)
info = heal_checkpoint(
    "example_output/checkpoint",
    "example_output/text.txt",
    "example_output/healed",
    max_steps=2,
    batch_size=2,
    block_size=32,
    eval_interval=1,
    overwrite=True,
    resume="never",
)
scores = info["healing"]["scores"]
print(f"Loss on held-out text: {scores['before']['eval_loss']:.3f} before, {scores['after']['eval_loss']:.3f} after")
