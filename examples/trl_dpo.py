"""Train a checkpoint with TRL's DPOTrainer. Run build_checkpoint.py first, and pip install trl.

Without a `ref_model`, TRL loads one by the model's name. This needs a --format hf folder. It also needs
trust_remote_code=True in DPOConfig, or `import model_preparation` first. A model from `load_checkpoint` does not
name its folder: give a `ref_model`.
"""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from model_preparation import load_checkpoint

rows = {"prompt": ["Mia likes"], "chosen": [" quinces ."], "rejected": [" eggs ."]}
model, tokenizer = load_checkpoint("example_output/checkpoint")
trainer = DPOTrainer(
    model,
    ref_model=load_checkpoint("example_output/checkpoint")[0],
    args=DPOConfig(
        "example_output/trl",
        max_steps=2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({name: texts * 8 for name, texts in rows.items()}),
    processing_class=tokenizer,
)
print(f"Loss {trainer.train().training_loss:.3f}; before training it is 0.693")
