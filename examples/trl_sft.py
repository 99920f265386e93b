"""Train with TRL on padded, packed and padding-free batches. Run build_checkpoint.py first, and pip install trl."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from model_preparation import load_checkpoint

texts = ["Mia likes quinces .", "Rosa likes eggs . Mia likes quinces .", "Leo likes jam ."] * 8
rows = Dataset.from_dict({"text": texts})
for name, options in {"padded": {}, "packed": {"packing": True}, "padding-free": {"padding_free": True}}.items():
    model, tokenizer = load_checkpoint("example_output/checkpoint")  # or AutoModelForCausalLM, on a --format hf folder
    arguments = SFTConfig(
        "example_output/trl",
        max_length=32 if name == "packed" else None,
        max_steps=2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        **options,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    print(f"{name}: loss {trainer.train().training_loss:.3f}")
