"""Many checkpoints: create_replaced_model_checkpoint.py builds each combination of a list in a process of its own.

A complete checkpoint is skipped if its checkpoint_info.json says that it is the one asked for. No hub is asked about
that: a base on this disk is compared by the digests of its files, a base from a hub by its id and its revision.
"""

import argparse
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_folder import describe_parent
from model_preparation.checkpoint.checkpoint_info import INFO, TOKENIZER, descent_of, grafted_heads, read_info
from model_preparation.command_line import heads_by_layer
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import donors_of, folder_named, has_tokenizer, target_named
from model_preparation.io.result_inputs import differences as differences_of
from model_preparation.io.untrusted.untrusted_files import read_json
from model_preparation.jobs.combinations import Combination
from model_preparation.jobs.jobs import Ended, Job, Runner, outcomes_of, run_in_turn
from model_preparation.jobs.table import table

BUILDER = Path(__file__).resolve().parents[1] / "create_replaced_model_checkpoint.py"


@dataclass(frozen=True)
class Outcome:
    """What happened to a combination.

    `status` is built, checked (--dry_run), skipped or failed. `note` says why it failed, or what is unusual.
    """

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
    """Build each combination that has no complete checkpoint yet. One that fails does not stop the others.

    Args:
        combinations: what to build.
        output_root: the folder of the checkpoints' folders.
        passed_on: flags for the builder, as typed.
        flags: the same flags, parsed by the builder's parser.
        run_jobs: how builds run: `run_in_turn` or a `RayRunner`.
        builder: the command that builds one.
    """
    paths = [output_root / combination.name for combination in combinations]

    def finish(number: int, ended: Ended) -> Outcome:
        status = "failed" if ended.reason else "checked" if flags.dry_run else "built"
        return Outcome(combinations[number], status, ended.seconds, paths[number], ended.reason)

    prepared: list[Job | Outcome] = []
    for combination, path in zip(combinations, paths, strict=True):
        if is_complete(path) and not flags.overwrite:
            prepared.append(_examine(combination, path, flags))
        else:
            arguments = _arguments(combination, path, passed_on)
            prepared.append(Job(combination.name, builder, arguments, writes_to=output_root))
    return outcomes_of(prepared, run_jobs, finish)


def describe(outcomes: Sequence[Outcome]) -> str:
    """A table with a row per outcome."""
    rows = []
    for outcome in outcomes:
        layers = outcome.combination.heads or " ".join(map(str, outcome.combination.layers))
        seconds = f"{outcome.seconds:.1f}"
        rows.append((outcome.combination.name, layers, outcome.status, seconds, str(outcome.path), outcome.note))
    return table(("name", "layers", "status", "seconds", "path", "note"), rows)


def _examine(combination: Combination, path: Path, flags: argparse.Namespace) -> Outcome:
    """Skip a complete checkpoint if it is the one asked for, else fail. Says which."""
    started = time.monotonic()
    try:
        differing = differences(path, combination, flags)
        status, note = ("failed", "differs: ") if differing else ("skipped", "")
        note += "; ".join(differing or remarks(path, combination))
    except SurgeryError as error:
        status, note = "failed", str(error)
    if status == "failed":
        advice = "Replace it with --overwrite, or choose another --output_root."
        print(f"{path} is complete, but not as asked: {note}. {advice}", file=sys.stderr, flush=True)
    else:
        print(f"{path} is complete already" + (f" ({note})" if note else ""), flush=True)
    return Outcome(combination, status, time.monotonic() - started, path, note)


def _arguments(combination: Combination, path: Path, passed_on: Sequence[str]) -> tuple[str, ...]:
    grafts = ["--heads", *combination.heads.split()] if combination.heads else []
    grafts += ["--layers", *map(str, combination.layers)] if combination.layers else []
    arguments = [*grafts, "--output_dir", str(path)]
    # With =, so that a description may begin with a hyphen.
    arguments += [f"--description={combination.description}"] if combination.description else []
    arguments += [f"--score={combination.score}"] if combination.score else []
    return (*arguments, *passed_on)


def is_complete(folder: Path) -> bool:
    """Whether the folder has the file that a complete checkpoint has."""
    return (folder / INFO).is_file()


def differences(folder: Path, combination: Combination, flags: argparse.Namespace) -> list[str]:
    """How the checkpoint differs from what is asked for: layers, format, dtype, base, donor's layers, tokenizer.

    Args:
        folder: a complete checkpoint.
        combination: what is asked for.
        flags: of create_replaced_model_checkpoint.py, parsed.

    Raises:
        SurgeryError: if its checkpoint_info.json cannot be read.
    """
    info = read_info(folder)
    name = flags.base or "unaligned_llamba"
    target = target_named(name, flags.source)
    base = folder_named(target)
    parent = base if base is not None and is_complete(base) else None
    steps = descent_of(info)
    step = steps[-1] if parent and len(steps) > 1 else {**info, "grafted": info["replaced_layers"]}
    recorded = {
        "layers": step.get("grafted"),
        "heads": grafted_heads(step),
        "ungrafted": step.get("ungrafted", []),
        "format": info.get("format", "pt"),
        "dtype": info.get("dtype"),
        "keep_mixer_heads": info.get("keep_mixer_heads", False),
    }
    asked = {
        **recorded,
        "layers": list(combination.layers),
        "heads": (heads := heads_by_layer(combination.heads.split()) | (flags.heads or {})),
        "keep_mixer_heads": flags.keep_mixer_heads if heads else recorded["keep_mixer_heads"],
        "ungrafted": sorted(flags.ungraft or []),
        "dtype": flags.dtype or recorded["dtype"],
    }
    if recorded["format"] != "both":
        asked["format"] = flags.format or "pt"
    found = differences_of(recorded, asked)
    layers_dir = Path(flags.llama_layers_dir[0]).expanduser()  # the list names no donors, so there is one
    if parent is not None:
        parents = step.get("from", {}), describe_parent(parent, read_info(parent))
        digests = ({"tensors": each.get("tensor_digests_sha256")} for each in parents)
        found += [f"base {each}" for each in differences_of(*digests)]
    else:
        found += [f"base {each}" for each in _of_base(info.get("base_model"), target)]
    grafted = {*map(str, asked["layers"]), *map(str, asked["heads"])}
    found += [f"donor's layer {each} in {layers_dir}" for each in _of_donor(info, layers_dir, grafted)]
    return found + _of_tokenizer(info, [flags.tokenizer, name], layers_dir, flags.source)


def remarks(folder: Path, combination: Combination) -> list[str]:
    """Differences that do not make it another checkpoint: score and description."""
    info = read_info(folder)
    found = []
    if combination.score and info.get("mmlu_score") != float(combination.score):
        found.append(f"its score is {info.get('mmlu_score')}, the list's {combination.score}")
    if combination.description and info.get("description") != combination.description:
        found.append(f"its description is {info.get('description')!r}")
    return found


def _of_base(recorded: Any, target: str) -> list[str]:
    """How the base recorded in a checkpoint differs from the present contents of `target`."""
    if not isinstance(recorded, dict):
        return ["not recorded"]
    if folder := folder_named(target):
        from model_preparation.checkpoint.digests import digests_as_recorded

        try:
            return [f"{each} in {folder}" for each in differences_of(*digests_as_recorded(recorded["files"], folder))]
        except (KeyError, TypeError, AttributeError):
            return ["its files are not recorded"]
    hub, colon, repository = target.rpartition(":")
    name, _, revision = repository.partition("@")
    there = f"{recorded.get('hub')}:{recorded.get('id')}"
    asked = f"{hub if colon else recorded.get('hub')}:{name}"
    if re.fullmatch("[0-9a-f]{40}", revision):  # only the hub knows the commit of a branch or tag
        there, asked = f"{there}@{recorded.get('revision')}", f"{asked}@{revision}"
    return differences_of({"id": there}, {"id": asked})


def _of_donor(info: Mapping[str, Any], layers_dir: Path, layers: Collection[str]) -> list[str]:
    """Which of these layers in a folder differ from those in the checkpoint. None if it has no layers."""
    try:
        extracted = read_json(layers_dir / "metadata.json")["layers"]
        there = {i: sha for donor in donors_of(info) for i, sha in donor["layers"].items() if i in layers}
        odd = differences_of(there, {index: entry["sha256"] for index, entry in extracted.items()}, of_both=True)
        if odd and "digests" in info:  # a file of other bytes may have the same tensors
            from model_preparation.checkpoint.digests import digest_of_layers
            from model_preparation.checkpoint.layer_store import LayerStore

            there = {index: digest for index, digest in info["digests"]["donor_layers"].items() if index in layers}
            odd = differences_of(there, digest_of_layers(LayerStore(layers_dir), map(int, there)))
        return odd
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SurgeryError):
        return []  # the build reports a folder that cannot be used


def _of_tokenizer(
    info: Mapping[str, Any], names: Sequence[str | None], layers_dir: Path, sources: Mapping[str, str]
) -> list[str]:
    """Whether the tokenizer differs, if it was recorded (since 0.2.0) and the one asked for is on this disk."""
    from model_preparation.checkpoint.digests import digest_of_tokenizer
    from model_preparation.io.untrusted.tokenizer_files import load_tokenizer

    asked, base = (None if name is None else target_named(name, sources) for name in names)
    of_base = folder_named(str(base))
    of_checkpoint = None if of_base is None else of_base / TOKENIZER
    folders = [folder_named(asked)] if asked else [of_base, of_checkpoint, layers_dir / TOKENIZER]
    folder = next((folder for folder in folders if folder is not None and has_tokenizer(folder)), None)
    there = info.get("digests", {}).get("tokenizer")
    if folder is None or there is None or (asked is None and folders[0] is None):
        return []
    return differences_of({"tokenizer": there}, {"tokenizer": digest_of_tokenizer(load_tokenizer(folder))})
