"""Command: a list of combinations -> one checkpoint each, by create_replaced_model_checkpoint.py.

In: a CSV or JSON file with, per combination, layers, and optionally score, description and name. Out: a folder per
combination, `llamba_replaced_11_13_17_21` unless the list names it, and a table at the end. Usually started by
create_best_checkpoints.sh, which finds the right Python.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation import create_replaced_model_checkpoint
from model_preparation.command_line import CommandParser, default_folder, run
from model_preparation.errors import SurgeryError

HERE = Path(__file__).resolve().parent
INFO = "checkpoint_info.json"  # what makes a checkpoint complete
FIELDS = {"layers", "score", "description", "name"}

SPACES = "layers are separated by spaces, not commas"

DESCRIPTION = """\
Build a checkpoint for every combination of layers in a list. One that fails does not stop the others, one that is
complete already is skipped (unless --overwrite is given), and a table ends it all. Exit code 1 if any failed.
Flags not listed here go to create_replaced_model_checkpoint.py as they are: --base, --llama_layers_dir, --gpu, ...
"""

EXAMPLES = """\
examples:
  ./create_best_checkpoints.sh
  ./create_best_checkpoints.sh --list mine.csv --output_root /data/checkpoints --base /models/my-llamba --gpu 1

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


@dataclass(frozen=True)
class Outcome:
    """What became of a combination: built, checked (--dry_run), skipped or failed."""

    combination: Combination
    status: str
    seconds: float
    path: Path


def main() -> None:
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--list",
        type=Path,
        default=HERE / "best_combinations.csv",
        metavar="FILE",
        help="combinations, as .csv or .json (default: the published ones, best_combinations.csv)",
    )
    parser.add_argument(
        "--output_root",
        type=Path,
        default=default_folder("model_checkpoints"),
        metavar="DIR",
        help="where the checkpoint folders go (default: %(default)s)",
    )
    args, passed_on = parser.parse_known_args()
    for flag in ("--layers", "--output_dir", "--description", "--score"):
        if any(given.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for given in passed_on):
            parser.error(f"{flag} comes from the list")
    builder = create_replaced_model_checkpoint.make_parser()
    builder.prog = "create_replaced_model_checkpoint.py"
    builder.parse_args(["--layers", "0", "--output_dir", "DIR", *passed_on])  # ends here if a flag is wrong

    outcomes = build_all(read_list(args.list), args.output_root.expanduser(), passed_on)
    print("\n" + table(outcomes))
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed:
        raise SurgeryError(
            f"{failed} of {len(outcomes)} checkpoints failed; the reasons are above. "
            "Run this again when they are mended: what is complete will be skipped."
        )


def read_list(path: Path) -> list[Combination]:
    """The combinations in a .csv or .json file, in its order.

    Raises:
        SurgeryError: naming the file and the entry that cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte-order mark
        entries = _json_entries(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except OSError as error:
        raise SurgeryError(
            f"{path} cannot be read ({error.strerror}). "
            "--list takes a .csv or .json file of combinations; --help shows what a list looks like."
        ) from error
    except (ValueError, csv.Error) as error:
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


def build_all(combinations: Sequence[Combination], output_root: Path, passed_on: Sequence[str]) -> list[Outcome]:
    """Run create_replaced_model_checkpoint.py for each combination that has no complete checkpoint yet."""
    outcomes = []
    for number, combination in enumerate(combinations, start=1):
        path = output_root / combination.name
        started = time.monotonic()
        print(f"\n[{number}/{len(combinations)}] {combination.name}", flush=True)
        if (path / INFO).is_file() and "--overwrite" not in passed_on:
            print("is complete already", flush=True)
            status = "skipped"
        elif _run(_build_command(combination, path, passed_on)) != 0:
            status = "failed"
        else:
            status = "built" if (path / INFO).is_file() else "checked"
        outcomes.append(Outcome(combination, status, time.monotonic() - started, path))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per outcome under a heading, in aligned columns."""
    rows = [("name", "layers", "status", "seconds", "path")]
    for outcome in outcomes:
        layers = " ".join(map(str, outcome.combination.layers))
        rows.append((outcome.combination.name, layers, outcome.status, f"{outcome.seconds:.1f}", str(outcome.path)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


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
    if Path(name).name != name or name in (".", ".."):
        raise ValueError(f"the name {name!r} is not that of a folder")
    score = str(values.get("score", "0"))
    try:
        create_replaced_model_checkpoint.score(score)
    except argparse.ArgumentTypeError:
        raise ValueError(f"the score {score} is not between 0 and 1, such as 0.57 ({SPACES})") from None
    return Combination(layers, str(values.get("score", "")), str(values.get("description", "")), name)


def _layer(word: Any) -> int:
    if not str(word).isdecimal():
        hint = f"; {SPACES}" if "," in str(word) else ""
        raise ValueError(f"{word!r} is not a layer index (an integer such as 11{hint})")
    return int(word)


def _build_command(combination: Combination, path: Path, passed_on: Sequence[str]) -> list[str]:
    command = [sys.executable, str(HERE / "create_replaced_model_checkpoint.py")]
    command += ["--layers", *map(str, combination.layers), "--output_dir", str(path)]
    # With =, so that a description may begin with a hyphen.
    command += [f"--description={combination.description}"] if combination.description else []
    command += [f"--score={combination.score}"] if combination.score else []
    return [*command, *passed_on]


def _run(command: list[str]) -> int:
    """Run a command and return its exit code. If we are interrupted, it is ended too and given time to clean up."""
    print("+ " + shlex.join(command), flush=True)
    # In a session of its own it does not get the terminal's Ctrl-C beside our signal, which would cut its cleaning up.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


if __name__ == "__main__":
    run(main)
