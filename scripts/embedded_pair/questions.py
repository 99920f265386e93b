"""Writes the task of the embedded pair into a folder: a copy of the package's definition, and new questions.

lm-eval's `--include_path` and our `--tasks` take this folder.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from model_preparation.embedded import recall
from model_preparation.hub.sources import EMBEDDED
from model_preparation.io.complete_file import write_file

TASK = "embedded_recall"


def write_task(folder: Path, count: int, people: int, seed: int) -> None:
    """Write the task into `folder`. The same arguments give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("embedded_recall.yaml", "read_questions.py"):
        shutil.copyfile(EMBEDDED / TASK / name, folder / name)
    asked = recall.questions(count, people, torch.Generator().manual_seed(seed))
    lines = [json.dumps(dataclasses.asdict(question)) for question in asked]
    write_file(folder / "questions.jsonl", "".join(f"{line}\n" for line in lines))
