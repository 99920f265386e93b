"""A list of combinations of layers, as create_best_checkpoints.py builds it and evaluate_checkpoints.py scores it.

In: a CSV or JSON file with, per combination, layers, and optionally score, description and name. Out: `Combination`s,
each with the name of its folder: `llamba_replaced_11_13_17_21` unless the list names it.
"""

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation import command_line
from model_preparation.errors import SurgeryError
from model_preparation.io.text import read_text
from model_preparation.terminal import STEERING

FIELDS = {"layers", "score", "description", "name"}
SPACES = "layers are separated by spaces, not commas"
EXAMPLE = """\
a list, as CSV (score, description and name may be left out):
  layers,score,description,name
  11 13 17 21,0.5700,best four,best_4layer
or as JSON:
  [{"layers": [11, 13, 17, 21], "score": 0.57, "description": "best four", "name": "best_4layer"}]
"""


@dataclass(frozen=True)
class Combination:
    """One entry of a list."""

    layers: tuple[int, ...]  # sorted
    score: str  # as --score takes it, "" if unknown
    description: str
    name: str  # of the folder


def read_list(path: Path) -> list[Combination]:
    """The combinations in a .csv or .json file, in its order.

    Raises:
        SurgeryError: naming the file and the entry that cannot be used.
    """
    try:
        text = read_text(path)
        entries = _json_entries(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except OSError as error:
        raise SurgeryError(
            f"{path} cannot be read ({error.strerror}). "
            "--list takes a .csv or .json file of combinations; --help shows what a list looks like."
        ) from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise SurgeryError(f"{path} cannot be read: {error}. --help shows what a list looks like.") from error
    combinations = []
    for number, entry in enumerate(entries, start=1):
        try:
            combinations.append(_combination(entry))
        except ValueError as error:
            raise SurgeryError(f"{path}, entry {number}: {error}. --help shows what a list looks like.") from error
    names = [combination.name for combination in combinations]
    for name in names:
        if names.count(name) > 1:
            raise SurgeryError(f"{path} has {names.count(name)} entries for the folder {name}. Name each differently.")
    if not combinations:
        raise SurgeryError(f"{path} lists no combinations. --help shows what a list looks like.")
    return combinations


def _json_entries(text: str) -> list[dict[str, Any]]:
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it is not a list of objects")
    return entries


def _combination(entry: dict[Any, Any]) -> Combination:
    """Check one entry as a file gives it; raises ValueError with what is wrong."""
    values = {key: value for key, value in entry.items() if value not in (None, "")}
    unknown = sorted(str(key or f"a value without a column ({SPACES})") for key in values.keys() - FIELDS)
    if unknown:
        raise ValueError(f"it has {', '.join(unknown)}; known are {', '.join(sorted(FIELDS))}")
    given = values.get("layers", [])
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else [given]
    layers = tuple(sorted(_layer(word) for word in words))
    if not layers:
        raise ValueError("it has no layers")
    name = str(values.get("name", "llamba_replaced_" + "_".join(map(str, layers))))
    if Path(name).name != name or name in (".", "..") or STEERING.search(name):
        raise ValueError(f"the name {name!r} is not that of a folder")
    score = str(values.get("score", "0"))
    try:
        command_line.score(score)
    except argparse.ArgumentTypeError:
        raise ValueError(f"the score {score} is not between 0 and 1, such as 0.57 ({SPACES})") from None
    return Combination(layers, str(values.get("score", "")), str(values.get("description", "")), name)


def _layer(word: Any) -> int:
    if not str(word).isdecimal():
        hint = f"; {SPACES}" if "," in str(word) else ""
        raise ValueError(f"{word!r} is not a layer index (an integer such as 11{hint})")
    return int(word)
