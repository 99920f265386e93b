"""Whether a complete checkpoint is the one that a list asks for, by what its checkpoint_info.json says.

In: its folder, a combination, and the flags of create_replaced_model_checkpoint.py. Out: what differs, in words. A base
on this disk is known by its files' digests. No hub is asked: a base from there is known by its id and, where both name
one, its revision.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import INFO, TOKENIZER, read_info
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import folder_named, has_tokenizer, target_named
from model_preparation.io.identity import differences as differences_of
from model_preparation.io.untrusted.untrusted_files import read_json
from model_preparation.jobs.combinations import Combination


def is_complete(folder: Path) -> bool:
    """Whether the folder has the mark of a complete checkpoint."""
    return (folder / INFO).is_file()


def differences(folder: Path, combination: Combination, flags: argparse.Namespace) -> list[str]:
    """In what the checkpoint is another than asked for: layers, format, dtype, base, donor's layers, tokenizer.

    Args:
        folder: a complete checkpoint.
        flags: of create_replaced_model_checkpoint.py, parsed.

    Raises:
        SurgeryError: if its checkpoint_info.json cannot be read.
    """
    info = read_info(folder)
    recorded = {"layers": info["replaced_layers"], "format": info.get("format", "pt"), "dtype": info.get("dtype")}
    asked = {**recorded, "layers": list(combination.layers), "dtype": flags.dtype or recorded["dtype"]}
    if recorded["format"] != "both":
        asked["format"] = flags.format or "pt"
    found = differences_of(recorded, asked)
    name = flags.base or "unaligned_llamba"
    layers_dir = Path(flags.llama_layers_dir).expanduser()
    found += [f"base {each}" for each in _of_base(info.get("base_model"), target_named(name, flags.source))]
    found += [f"donor's layer {each} in {layers_dir}" for each in _of_donor(info, layers_dir)]
    return found + _of_tokenizer(info, [flags.tokenizer, name], layers_dir, flags.source)


def remarks(folder: Path, combination: Combination) -> list[str]:
    """In what the checkpoint differs from the list without being another one: score and description."""
    info = read_info(folder)
    found = []
    if combination.score and info.get("mmlu_score") != float(combination.score):
        found.append(f"its score is {info.get('mmlu_score')}, the list's {combination.score}")
    if combination.description and info.get("description") != combination.description:
        found.append(f"its description is {info.get('description')!r}")
    return found


def _of_base(recorded: Any, target: str) -> list[str]:
    """In what a base recorded in a checkpoint differs from what `target` stands for today."""
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
    if re.fullmatch("[0-9a-f]{40}", revision):  # of a branch or tag only the hub knows what it is
        there, asked = f"{there}@{recorded.get('revision')}", f"{asked}@{revision}"
    return differences_of({"id": there}, {"id": asked})


def _of_donor(info: Mapping[str, Any], layers_dir: Path) -> list[str]:
    """In which layers a folder differs from those the checkpoint was made of; none where it has none."""
    try:
        extracted = read_json(layers_dir / "metadata.json")["layers"]
        there = info["replacement_source"]["layers"]
        odd = differences_of(there, {index: entry["sha256"] for index, entry in extracted.items()}, of_both=True)
        if odd and "digests" in info:  # the same tensors may be in a file of other bytes
            from model_preparation.checkpoint.digests import digest_of_layers
            from model_preparation.checkpoint.layer_store import LayerStore

            there = info["digests"]["donor_layers"]
            odd = differences_of(there, digest_of_layers(LayerStore(layers_dir), map(int, there)))
        return odd
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SurgeryError):
        return []  # a folder that cannot be used is the build's to report


def _of_tokenizer(
    info: Mapping[str, Any], names: Sequence[str | None], layers_dir: Path, sources: Mapping[str, str]
) -> list[str]:
    """Whether the tokenizer is another, where that was recorded (since 0.2.0) and the one asked for is on this disk."""
    from model_preparation.checkpoint.digests import digest_of_tokenizer
    from model_preparation.io.untrusted.tokenizer_files import load_tokenizer

    asked, base = (None if name is None else target_named(name, sources) for name in names)
    folders = [folder_named(asked)] if asked else [folder_named(str(base)), layers_dir / TOKENIZER]
    folder = next((folder for folder in folders if folder is not None and has_tokenizer(folder)), None)
    there = info.get("digests", {}).get("tokenizer")
    if folder is None or there is None or (asked is None and folders[0] is None):
        return []
    return differences_of({"tokenizer": there}, {"tokenizer": digest_of_tokenizer(load_tokenizer(folder))})
