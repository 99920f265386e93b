"""The questions of `embedded_recall`, from the file next to this one, wherever the package is installed."""

import json
from pathlib import Path

import datasets


def read(**_metadata) -> dict[str, datasets.Dataset]:
    """The split `test`: `context` (text), `choices` (four texts) and `answer` (index of the right one)."""
    lines = Path(__file__).with_name("questions.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
