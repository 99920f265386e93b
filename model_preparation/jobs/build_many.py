"""Builds many checkpoints: create_replaced_model_checkpoint.py builds each combination in a process of its own.

A complete checkpoint is skipped if its checkpoint_info.json fits the request. No hub is asked for this. A
base on this disk is compared by the digests of its files. A base from a hub is compared by its id, and by its
commit if one is given.
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
    """The outcome for one combination.

    `status` is built, checked (--dry_run), skipped or failed. `note` has the reason of a failure, or `remarks`.
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
    """Build each combination that has no complete checkpoint yet. A build that fails does not stop the others.

    Args:
        combinations: the combinations to build.
        output_root: the folder that gets a folder for each checkpoint.
        passed_on: flags for the builder, as the user typed them.
        flags: the same flags, parsed by the builder's parser.
        run_jobs: how builds run: `run_in_turn` or a `RayRunner`.
        builder: the Python file that builds one checkpoint.
    """
    paths = [output_root / combination.name for combination in combinations]

    def finish(number: int, ended: Ended) -> Outcome:
        status = "failed" if ended.reason else "checked" if flags.dry_run else "built"
        return Outcome(combinations[number], status, ended.seconds, paths[number], ended.reason)

    prepared: list[Job | Outcome] = []
    for combination, path in zip(combinations, paths, strict=True):
        if is_complete(path) and not flags.overwrite:
            prepared.append(_skip_or_fail(combination, path, flags))
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


def _skip_or_fail(combination: Combination, path: Path, flags: argparse.Namespace) -> Outcome:
    """The outcome for a complete checkpoint: skipped if it fits the request, otherwise failed. Also prints it."""
    started = time.monotonic()
    try:
        differing = differences(path, combination, flags)
        status, note = ("failed", "differs: ") if differing else ("skipped", "")
        note += "; ".join(differing or remarks(path, combination))
        fault = f"{path} is complete, but not as asked: {note}."
    except SurgeryError as error:
        status, note = "failed", str(error)
        fault = note
    if status == "failed":
        advice = "Replace it with --overwrite, or choose another --output_root."
        print(f"{fault} {advice}", file=sys.stderr, flush=True)
    else:
        print(f"{path} is complete already" + (f" ({note})" if note else ""), flush=True)
    return Outcome(combination, status, time.monotonic() - started, path, note)


def _arguments(combination: Combination, path: Path, passed_on: Sequence[str]) -> tuple[str, ...]:
    grafts = ["--heads", *combination.heads.split()] if combination.heads else []
    grafts += ["--layers", *map(str, combination.layers)] if combination.layers else []
    arguments = [*grafts, "--output_dir", str(path)]
    # With =, a description may begin with a hyphen.
    arguments += [f"--description={combination.description}"] if combination.description else []
    arguments += [f"--score={combination.score}"] if combination.score else []
    return (*arguments, *passed_on)


def is_complete(folder: Path) -> bool:
    """Whether the folder has checkpoint_info.json, which only complete checkpoints have."""
    return (folder / INFO).is_file()


def differences(folder: Path, combination: Combination, flags: argparse.Namespace) -> list[str]:
    """How a checkpoint differs from the request in layers, heads, format, dtype, base, donor or tokenizer.

    Args:
        folder: a complete checkpoint.
        combination: the requested combination.
        flags: the parsed flags of create_replaced_model_checkpoint.py.

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
    layers_dir = Path(flags.llama_layers_dir[0]).expanduser()  # the only folder: combinations name no donors
    if parent is not None:
        parents = step.get("from", {}), describe_parent(parent, read_info(parent))
        digests = ({"tensors": each.get("tensor_digests_sha256")} for each in parents)
        found += [f"base {each}" for each in differences_of(*digests)]
    else:
        found += [f"base {each}" for each in _base_differences(info.get("base_model"), target)]
    grafted = {*map(str, asked["layers"]), *map(str, asked["heads"])}
    found += [f"donor's layer {each} in {layers_dir}" for each in _donor_differences(info, layers_dir, grafted)]
    return found + _tokenizer_differences(info, [flags.tokenizer, name], layers_dir, flags.source)


def remarks(folder: Path, combination: Combination) -> list[str]:
    """How score and description differ from the request. The checkpoint is skipped even if they do."""
    info = read_info(folder)
    found = []
    if combination.score and info.get("mmlu_score") != float(combination.score):
        found.append(f"its score is {info.get('mmlu_score')}, but {combination.score} in the list")
    if combination.description and info.get("description") != combination.description:
        found.append(f"its description is {info.get('description')!r}")
    return found


def _base_differences(recorded: Any, target: str) -> list[str]:
    """How the recorded base differs from the present contents of `target`."""
    if not isinstance(recorded, dict):
        return ["not recorded"]
    if folder := folder_named(target):
        from model_preparation.checkpoint.model_digests import digests_as_recorded

        try:
            return [f"{each} in {folder}" for each in differences_of(*digests_as_recorded(recorded["files"], folder))]
        except (KeyError, TypeError, AttributeError):
            return ["its files are not recorded"]
    hub, colon, repository = target.rpartition(":")
    name, _, revision = repository.partition("@")
    built = f"{recorded.get('hub')}:{recorded.get('id')}"
    asked = f"{hub if colon else recorded.get('hub')}:{name}"
    if re.fullmatch("[0-9a-f]{40}", revision):  # only the hub knows the commit of a branch or tag
        built, asked = f"{built}@{recorded.get('revision')}", f"{asked}@{revision}"
    return differences_of({"id": built}, {"id": asked})


def _donor_differences(info: Mapping[str, Any], layers_dir: Path, layers: Collection[str]) -> list[str]:
    """How these layers in `layers_dir` differ from those in the checkpoint. Empty if the folder cannot be read."""
    try:
        extracted = read_json(layers_dir / "metadata.json")["layers"]
        built = {i: sha for donor in donors_of(info) for i, sha in donor["layers"].items() if i in layers}
        found = differences_of(built, {index: entry["sha256"] for index, entry in extracted.items()}, of_both=True)
        if found and "digests" in info:  # files with other bytes may have the same tensors
            from model_preparation.checkpoint.layer_store import LayerStore
            from model_preparation.checkpoint.model_digests import digest_of_layers

            built = {index: digest for index, digest in info["digests"]["donor_layers"].items() if index in layers}
            found = differences_of(built, digest_of_layers(LayerStore(layers_dir), map(int, built)))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SurgeryError):
        return []  # a build reports such a folder; a complete checkpoint does not need it


def _tokenizer_differences(
    info: Mapping[str, Any], names: Sequence[str | None], layers_dir: Path, sources: Mapping[str, str]
) -> list[str]:
    """How the tokenizer differs, if the checkpoint records it (since 0.2.0) and the requested one is on this disk."""
    from model_preparation.checkpoint.model_digests import digest_of_tokenizer
    from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

    asked, base = (None if name is None else target_named(name, sources) for name in names)  # `asked` may be None
    folders = [folder_named(str(asked or base))]
    if folders[0] is not None and not asked:
        folders += [folders[0] / TOKENIZER, layers_dir / TOKENIZER]  # a checkpoint's own, or the donor's
    folder = next((folder for folder in folders if folder is not None and has_tokenizer(folder)), None)
    built = info.get("digests", {}).get("tokenizer")
    if folder is None or built is None:
        return []
    return differences_of({"tokenizer": built}, {"tokenizer": digest_of_tokenizer(load_tokenizer(folder))})
