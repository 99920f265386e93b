"""Train a checkpoint in two stages with different settings. Run build_checkpoint.py first."""

from pathlib import Path

from model_preparation import heal_in_stages

Path("example_output/short.txt").write_text("Mia likes quinces . Rosa likes eggs . Mia likes quinces . " * 100)
stages = [
    {"name": "short", "block_size": 16, "learning_rate": 1e-3},
    {"name": "long", "block_size": 64, "learning_rate": 1e-4, "method": "grafted"},
]
info = heal_in_stages(
    "example_output/checkpoint",
    stages,
    "example_output/healed_in_stages",
    data="example_output/short.txt",
    max_steps=2,
    eval_interval=1,
    overwrite=True,
    resume="never",
)
names = [stage["settings"]["stage"] for stage in [*info["healing"]["earlier_stages"], info["healing"]]]
print(f"Stages: {', '.join(names)}")
