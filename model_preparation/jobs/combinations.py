"""Combinations of layers to build or to evaluate: from a CSV or JSON list, or the best of a search.

The folder of the combination 11 13 17 21 is `llamba_replaced_11_13_17_21`, unless the list has another name for it.
"""

import argparse
import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation import command_line
from model_preparation.errors import SurgeryError
from model_preparation.io.text import read_text
from model_preparation.search.result_reader import read_result
from model_preparation.terminal import STEERING

FIELDS = {"layers", "score", "description", "name"}
SPACES = "layers are separated by spaces, not commas"
_HINT = "create_best_checkpoints.sh --help shows what a list looks like."
EXAMPLE = """\
a list, as CSV (score, description and name may be left out):
  layers,score,description,name
  11 13 17 21,0.5700,best four,best_4layer
or as JSON:
  [{"layers": [11, 13, 17, 21], "score": 0.57, "description": "best four", "name": "best_4layer"}]
"""


@dataclass(frozen=True)
class Combination:
    """One entry of a list. `score` and `heads` have the form of --score and --heads; "" means there is none."""

    layers: tuple[int, ...]  # sorted
    score: str
    description: str
    name: str  # the folder's name
    heads: str = ""


def read_list(path: Path) -> list[Combination]:
    """The combinations in a .csv or .json file, in its order.

    Raises:
        SurgeryError: if the file or one of its entries cannot be used.
    """
    try:
        text = read_text(path)
        entries = _json_entries(text) if path.suffix == ".json" else _csv_entries(text)
    except OSError as error:
        raise SurgeryError(
            f"{path} cannot be read ({error.strerror}). Give a .csv or .json file of combinations: {_HINT}"
        ) from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise SurgeryError(f"{path} cannot be read: {error}. {_HINT}") from error
    combinations = []
    for number, entry in enumerate(entries, start=1):
        try:
            combinations.append(_combination(entry))
        except ValueError as error:
            raise SurgeryError(f"{path}, entry {number}: {error}. {_HINT}") from error
    names = [combination.name for combination in combinations]
    for name in names:
        if names.count(name) > 1:
            raise SurgeryError(f"{path} has {names.count(name)} entries for the folder {name}. Name each differently.")
    if not combinations:
        raise SurgeryError(f"{path} lists no combinations. {_HINT}")
    return combinations


def best_of(path: Path, count: int) -> tuple[list[Combination], dict[str, str]]:
    """A search's best combinations. Also builder flags: base, donor layers, tokenizer, --keep_mixer_heads.

    Args:
        path: search_result.json, or an older program's result file.
        count: how many combinations; there may be fewer.

    Raises:
        SurgeryError: if the file cannot be read.
    """
    path = path.expanduser()
    found = read_result(path)
    if found.failures:
        print(f"{found.failures} entries of {path} are left out: a score of 0 means a failed evaluation")
    combinations = []
    for rank, each in enumerate(found.entries[:count], start=1):
        is_mmlu = found.is_mmlu and each.score is not None and 0 <= each.score <= 1
        score = f"{each.score:.6g}" if is_mmlu else ""
        fitness = "" if each.score is None else f", {found.objective} {each.score:.4f}"
        description = f"number {rank} of {path.name}{fitness}"
        name = _default_name(each.layers or each.heads.replace(":", "-").split())
        combinations.append(Combination(each.layers, score, description, name, each.heads))
    flags = {"--base": found.base, "--llama_layers_dir": found.llama_layers_dir, "--tokenizer": found.tokenizer}
    given = {flag: value for flag, value in flags.items() if value is not None}
    return combinations, {**given, **({"--keep_mixer_heads": ""} if found.keep_mixer_heads else {})}


def check_layers(path: Path) -> None:
    """Raise SurgeryError if a result file names a folder of donor's layers that does not exist any more."""
    from model_preparation.checkpoint.layer_store import METADATA

    found = read_result(path.expanduser())
    if found.llama_layers_dir is None or (Path(found.llama_layers_dir) / METADATA).is_file():
        return
    raise SurgeryError(
        f"The search of {path} used the donor's layers in {found.llama_layers_dir}, which are gone. Extract them "
        f"again: python extract_layers.py --model_name {found.donor or 'DONOR'} --output_dir {found.llama_layers_dir}; "
        "or give others by --llama_layers_dir DIR."
    )


def _default_name(layers: Iterable[int | str]) -> str:
    return "llamba_replaced_" + "_".join(map(str, layers))


def _json_entries(text: str) -> list[dict[str, Any]]:
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it is not a list of objects in [ ]")
    return entries


def _csv_entries(text: str) -> list[dict[Any, Any]]:
    reader = csv.DictReader(text.splitlines())
    if "layers" not in (columns := reader.fieldnames or []):
        raise ValueError(f"its first line must name the columns (one is layers), but it is {','.join(columns)!r:.80}")
    return list(reader)


def _combination(entry: dict[Any, Any]) -> Combination:
    """Read one entry of a file; raises ValueError if it is invalid."""
    values = {key: value for key, value in entry.items() if value not in (None, "")}
    unknown = sorted(str(key or f"more values than columns ({SPACES})") for key in values.keys() - FIELDS)
    if unknown:
        raise ValueError(f"it has {', '.join(unknown)}; known are {', '.join(sorted(FIELDS))}")
    given = values.get("layers", [])
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else [given]
    layers = tuple(sorted(_layer(word) for word in words))
    if not layers:
        raise ValueError("it has no layers")
    name = str(values.get("name", _default_name(layers)))
    if Path(name).name != name or name in (".", "..") or STEERING.search(name):
        raise ValueError(f"the name {name!r} cannot be a folder's name")
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
