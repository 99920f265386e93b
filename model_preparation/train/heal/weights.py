"""Weights from anywhere into a model, with nothing hidden.

In: a file or folder of tensors. Out: the model with those that fit, and a `KeyReport` of those that are missing,
unexpected, of another shape, or left out as asked.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, read_info
from model_preparation.checkpoint.load import without_wrapper_prefixes
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_files import TensorFiles, load_tensors
from model_preparation.io.tensors.tensor_ranges import MappedFiles, safetensors_ranges

_SHOWN = 5


@dataclass(frozen=True)
class KeyReport:
    """How the names of tensors found fit those wanted.

    Attributes:
        loaded: those that fit.
        missing: wanted and not found.
        unexpected: found, and nobody wants them.
        mismatched: of another shape: name, shape found, shape wanted.
        excluded: not taken, as asked.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every name found its partner, in the same shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def lines(self) -> list[str]:
        """What there is to say, a line per kind; how many were loaded comes first."""
        shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in self.mismatched]
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": shapes,
            "excluded": self.excluded,
        }
        return [f"loaded {len(self.loaded)} tensors"] + [
            f"{kind} {len(names)}: {', '.join(names[:_SHOWN])}" + (", ..." if len(names) > _SHOWN else "")
            for kind, names in kinds.items()
            if names
        ]


def compare_keys(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], exclude: Sequence[str] = ()) -> KeyReport:
    """How `found` fits `wanted`; names that match a pattern of `exclude`, or begin with it and a dot, are left out."""
    report = KeyReport()
    for name in wanted:
        if _matches(name, exclude):
            report.excluded.append(name)
        elif name not in found:
            report.missing.append(name)
        elif found[name].shape != wanted[name].shape:
            report.mismatched.append((name, tuple(found[name].shape), tuple(wanted[name].shape)))
        else:
            report.loaded.append(name)
    report.unexpected.extend(sorted(name for name in found.keys() - wanted.keys() if not _matches(name, exclude)))
    return report


@torch.no_grad()
def load_weights(model: nn.Module, path: Path, exclude: Sequence[str] = ()) -> KeyReport:
    """Copy the tensors in `path` into a model, cast to its dtypes, as far as they fit; returns how far that was.

    Names may begin with `module.` or `_orig_mod.`. Of tied tensors one is enough.

    Raises:
        SurgeryError: if `path` holds no tensors, or something else too, or none of them fits.
    """
    found = without_wrapper_prefixes(read_weights(path))
    wanted = model.state_dict()
    for tied, name in (getattr(model, "_tied_weights_keys", None) or {}).items():
        if tied in wanted and wanted[tied].data_ptr() == wanted[name].data_ptr():
            found.pop(tied, None) if name in found else None
            wanted.pop(tied)
    report = compare_keys(wanted, found, exclude)
    if not report.loaded:
        raise SurgeryError(f"No tensor of {path} fits the model: {'; '.join(report.lines())}.")
    for name in report.loaded:
        wanted[name].copy_(found[name])
    return report


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, a checkpoint, or a model's folder, mapped from there.

    Raises:
        SurgeryError: if there are none, or a file holds anything but tensors by name.
    """
    if path.is_dir():
        if (path / INFO).is_file() and read_info(path).get("format") != "hf":
            return load_tensors(path / STATE_DICT)
        files = TensorFiles(path)
        return {name: files[name] for name in files.names()}
    if not path.is_file():
        raise SurgeryError(f"{path} is not there. Give a file or folder of weights.")
    if path.suffix == ".safetensors":
        mapped = MappedFiles()
        return {name: mapped.tensor(place) for name, place in safetensors_ranges(path).items()}
    return load_tensors(path)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)
