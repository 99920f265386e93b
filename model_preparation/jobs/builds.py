"""Checkpoints for a list of combinations, each built by create_replaced_model_checkpoint.py in a process of its own.

In: combinations, the folder for their folders, the builder's flags. Out: an `Outcome` for each, in the list's order.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model_preparation.errors import SurgeryError
from model_preparation.jobs.combinations import Combination
from model_preparation.jobs.existing import differences, is_complete, remarks
from model_preparation.jobs.jobs import Job, Runner, run_in_turn
from model_preparation.jobs.table import table

BUILDER = Path(__file__).resolve().parents[1] / "create_replaced_model_checkpoint.py"


@dataclass(frozen=True)
class Outcome:
    """What became of a combination: built, checked (--dry_run), skipped or failed; and why, or what is odd."""

    combination: Combination
    status: str
    seconds: float
    path: Path
    note: str = ""


def build_all(
    combinations: Sequence[Combination],
    output_root: Path,
    passed_on: Sequence[str],
    flags: argparse.Namespace,
    *,
    run_jobs: Runner = run_in_turn,
    builder: Path = BUILDER,
) -> list[Outcome]:
    """Build each combination that has no complete checkpoint yet.

    Args:
        output_root: the folder that the checkpoints' folders are in.
        passed_on: flags for the builder, as typed.
        flags: the same, parsed by the builder's own parser.
        run_jobs: how the builds are run: `run_in_turn`, or a `ray_jobs.RayRunner`.
        builder: the command that builds one.
    """
    outcomes: dict[int, Outcome] = {}
    jobs: dict[int, Job] = {}
    for number, combination in enumerate(combinations):
        path = output_root / combination.name
        if is_complete(path) and not flags.overwrite:
            outcomes[number] = _examine(combination, path, flags)
            stream = sys.stderr if outcomes[number].status == "failed" else sys.stdout
            print(_told(outcomes[number]), file=stream, flush=True)
        else:
            arguments = _arguments(combination, path, passed_on)
            jobs[number] = Job(combination.name, builder, arguments, writes_to=output_root)
    numbers = list(jobs)
    for index, ended in run_jobs(list(jobs.values())):
        combination = combinations[numbers[index]]
        path = output_root / combination.name
        status = "failed" if ended.reason else "checked" if flags.dry_run else "built"
        outcomes[numbers[index]] = Outcome(combination, status, ended.seconds, path, ended.reason)
    return [outcomes[number] for number in range(len(combinations))]


def describe(outcomes: Sequence[Outcome]) -> str:
    """The table of what became of a list."""
    rows = []
    for outcome in outcomes:
        layers = " ".join(map(str, outcome.combination.layers))
        seconds = f"{outcome.seconds:.1f}"
        rows.append((outcome.combination.name, layers, outcome.status, seconds, str(outcome.path), outcome.note))
    return table(("name", "layers", "status", "seconds", "path", "note"), rows)


def _examine(combination: Combination, path: Path, flags: argparse.Namespace) -> Outcome:
    """What to do with a folder that is complete: skip it, if it is the one asked for."""
    started = time.monotonic()
    try:
        differing = differences(path, combination, flags)
        status, note = ("failed", "differs: ") if differing else ("skipped", "")
        note += "; ".join(differing or remarks(path, combination))
    except SurgeryError as error:
        status, note = "failed", str(error)
    return Outcome(combination, status, time.monotonic() - started, path, note)


def _told(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return (
            f"{outcome.path} is complete, but not as asked: {outcome.note}. "
            "Replace it with --overwrite, or choose another --output_root."
        )
    return f"{outcome.path} is complete already" + (f" ({outcome.note})" if outcome.note else "")


def _arguments(combination: Combination, path: Path, passed_on: Sequence[str]) -> tuple[str, ...]:
    arguments = ["--layers", *map(str, combination.layers), "--output_dir", str(path)]
    # With =, so that a description may begin with a hyphen.
    arguments += [f"--description={combination.description}"] if combination.description else []
    arguments += [f"--score={combination.score}"] if combination.score else []
    return (*arguments, *passed_on)
