"""Reads the questions of `embedded_recall` from questions.jsonl, which is in the same folder as this file."""

import json
from pathlib import Path

import datasets


def read(**_metadata) -> dict[str, datasets.Dataset]:
    """The split `test`: `context` (text), `choices` (four texts) and `answer` (index of the right choice)."""
    lines = Path(__file__).with_name("questions.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
