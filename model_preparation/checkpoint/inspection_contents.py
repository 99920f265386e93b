"""What is in a file or folder of tensors: names, where each tensor lies, and plain values beside them.

In: a .safetensors file; a file of torch.save with tensors and plain values, however nested, or a `model.pt` of ours; a
checkpoint, a state of a healing run, extracted layers, an adapter, a Hugging Face folder. Out: `Contents`. Nothing is
read but headers, and no code is run: a file that names any is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, read_info
from model_preparation.checkpoint.tensor_digests import tensors_of
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange, pt_ranges, safetensors_ranges
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.pickle_check import TENSORS, allowed_in_module
from model_preparation.io.untrusted.pt_check import check_pt

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass
class Contents:
    """Tensors by name, and plain values (numbers, strings, None) by name."""

    tensors: dict[str, TensorRange] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def contents_of(path: Path) -> Contents:
    """What is in a file or folder.

    Of a folder with more than one file of tensors that are no shards of one model, every name begins with its file's.

    Raises:
        SurgeryError: if there is nothing of the kind, a file is damaged, or names a global that could run code.
    """
    if path.is_file():
        return _in_file(path)
    if not path.is_dir():
        raise SurgeryError(
            what_it_is(path) or f"{path} is not there. Give a file of tensors or a folder with such files."
        )
    if (path / INFO).is_file() and read_info(path).get("format") != "hf":
        return _in_file(path / STATE_DICT)
    if (path / "config.json").is_file():
        return Contents(TensorFiles(path).ranges)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise SurgeryError(
            what_it_is(path)
            or f"{path} holds no {', '.join(SUFFIXES)} files. Give a file of tensors or a folder of them."
        )
    if len(files) == 1:
        return _in_file(files[0])
    found = Contents()
    for file in files:
        inside = _in_file(file)
        found.tensors |= {f"{file.name}:{name}": place for name, place in inside.tensors.items()}
        found.values |= {f"{file.name}:{name}": value for name, value in inside.values.items()}
    return found


def _in_file(path: Path) -> Contents:
    if path.suffix == ".safetensors":
        return Contents(safetensors_ranges(path))
    try:
        try:
            check_pt(path, TENSORS)
        except ValueError:
            check_pt(path, allowed_in_module())
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found = dict(tensors_of(loaded)) if isinstance(loaded, nn.Module) else dict(_flat(loaded, ""))
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in found.items() if not isinstance(value, Tensor)}
        return Contents(pt_ranges(path, tensors), values)
    except (SurgeryError, OSError):
        raise
    except Exception as error:  # what passes the checks may still make torch raise anything at all
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SurgeryError(f"{path} is refused: {reason}. Only tensors and plain values can be looked at.") from error


def _flat(value: object, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor or plain value) of everything inside, names joined by dots; long rows of numbers count as one."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple | Tensor) for item in value):
        pairs = list(enumerate(value))
    else:
        yield name, value
        return
    for key, item in pairs:
        yield from _flat(item, f"{name}.{key}" if name else str(key))
