"""Whether a complete checkpoint is the one that a list asks for, by what its checkpoint_info.json says.

In: its folder, a combination, and the flags of create_replaced_model_checkpoint.py. Out: what differs, in words. No
weights are read and no hub is asked, so what cannot be known that way counts as equal.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_preparation.batch.combinations import Combination
from model_preparation.errors import SurgeryError
from model_preparation.surgery.checkpoint_info import INFO, read_info
from model_preparation.surgery.sources import target_named
from model_preparation.untrusted.untrusted_files import read_json


def is_complete(folder: Path) -> bool:
    """Whether the folder has the mark of a complete checkpoint."""
    return (folder / INFO).is_file()


def differences(folder: Path, combination: Combination, flags: argparse.Namespace) -> list[str]:
    """In what the checkpoint is another than asked for: layers, format, dtype, base, donor; none if it is the one.

    Args:
        folder: a complete checkpoint.
        flags: of create_replaced_model_checkpoint.py, parsed.

    Raises:
        SurgeryError: if its checkpoint_info.json cannot be read.
    """
    info = read_info(folder)
    found = []
    if info["replaced_layers"] != list(combination.layers):
        found.append(f"its layers are {_words(info['replaced_layers'])}, not {_words(combination.layers)}")
    format = flags.format or "pt"
    if info.get("format") not in (format, "both"):
        found.append(f"its format is {info.get('format')}, not {format}")
    if flags.dtype is not None and info.get("dtype") != flags.dtype:
        found.append(f"its dtype is {info.get('dtype')}, not {flags.dtype}")
    asked = flags.base or "unaligned_llamba"
    recorded = info.get("base_model")
    if not isinstance(recorded, dict) or not _may_be(recorded, asked, flags.source):
        found.append(f"its base is {_name(recorded)}, not {asked}")
    if _is_of_another_donor(info, Path(flags.llama_layers_dir).expanduser()):
        found.append(f"its replaced layers are not those in {flags.llama_layers_dir}")
    return found


def remarks(folder: Path, combination: Combination) -> list[str]:
    """In what the checkpoint differs from the list without being another one: score and description."""
    info = read_info(folder)
    found = []
    if combination.score and info.get("mmlu_score") != float(combination.score):
        found.append(f"its score is {info.get('mmlu_score')}, the list's {combination.score}")
    if combination.description and info.get("description") != combination.description:
        found.append(f"its description is {info.get('description')!r}")
    return found


def _may_be(recorded: Mapping[str, Any], asked: str, sources: Mapping[str, str]) -> bool:
    """Whether a base recorded in a checkpoint may be what `asked` stands for today."""
    target = target_named(asked, sources)
    folder = Path(os.path.expanduser(target))
    if folder.is_dir():
        if recorded.get("hub") != "local":
            return recorded.get("name") == asked
        # The same path, or the same name where the models were moved as a whole.
        return recorded.get("id") == Path(os.path.abspath(folder)).name and _sizes_fit(recorded.get("files"), folder)
    if recorded.get("hub") == "local":
        return recorded.get("name") == asked
    hub, colon, repository = target.rpartition(":")
    return recorded.get("id") == repository.partition("@")[0] and (not colon or recorded.get("hub") == hub)


def _sizes_fit(files: Any, folder: Path) -> bool:
    """Whether every recorded file is in the folder, with as many bytes."""
    try:
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, AttributeError, KeyError, TypeError):
        return False


def _is_of_another_donor(info: Mapping[str, Any], layers_dir: Path) -> bool:
    """Whether `layers_dir` has other layers than those the checkpoint was made of; False where it has none."""
    try:
        extracted = read_json(layers_dir / "metadata.json")["layers"]
        used = info["replacement_source"]["layers"]
        return any(extracted[index]["sha256"] != digest for index, digest in used.items() if index in extracted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SurgeryError):
        return False  # a folder that cannot be used is the build's to report


def _name(recorded: Any) -> str:
    if not isinstance(recorded, dict):
        return "not recorded"
    return str(recorded.get("path") or recorded.get("id") or recorded.get("name"))


def _words(layers: Any) -> str:
    return " ".join(map(str, layers)) or "none"
