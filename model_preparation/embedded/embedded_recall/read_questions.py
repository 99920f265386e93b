"""The questions of `embedded_recall`, from the file beside this one, wherever the package is installed."""

from pathlib import Path

import datasets


def read(**_metadata) -> dict[str, datasets.Dataset]:
    """The split `test`: `context` (text), `choices` (four texts) and `answer` (index of the right one)."""
    questions = Path(__file__).with_name("questions.jsonl")
    return {"test": datasets.Dataset.from_json(str(questions), cache_dir=None, keep_in_memory=True)}
