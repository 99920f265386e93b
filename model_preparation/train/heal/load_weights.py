"""Loads weights from any file or folder into a model, and reports every tensor that does not fit."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, read_info
from model_preparation.checkpoint.wrapper_prefixes import without_wrapper_prefixes
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.sharded_weights import TensorFiles, load_tensors
from model_preparation.io.tensors.tensor_ranges import MappedFiles, safetensors_ranges

_SHOWN = 5


@dataclass(frozen=True)
class KeyReport:
    """The comparison of the tensors found with the tensors wanted, by name.

    Attributes:
        loaded: tensors that fit.
        missing: wanted, but not found.
        unexpected: found, but not wanted.
        mismatched: of another shape: name, shape found, shape wanted.
        excluded: not loaded, because the user excluded them.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether exactly the wanted tensors were found, in the right shape. Excluded ones do not count."""
        return not (self.missing or self.unexpected or self.mismatched)

    def lines(self) -> list[str]:
        """The report: the number of loaded tensors, then a line for each kind of difference."""
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
    """Compare `found` with `wanted`. A name is excluded if it matches a pattern, or begins with a pattern and a dot."""
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
    """Copy tensors from `path` into a model, cast to the model's dtypes. Tensors that do not fit are only reported.

    Tensors' names may begin with `module.` or `_orig_mod.`. Of two tied tensors, `path` needs only one.

    Raises:
        SurgeryError: if `path` holds no tensors, or also other things than tensors, or if no tensor fits.
    """
    found = without_wrapper_prefixes(read_weights(path))
    wanted = model.state_dict()
    for tied, name in (getattr(model, "_tied_weights_keys", None) or {}).items():
        if tied in wanted and wanted[tied].data_ptr() == wanted[name].data_ptr():
            if tied in found:
                found.setdefault(name, found.pop(tied))
            wanted.pop(tied)
    report = compare_keys(wanted, found, exclude)
    if not report.loaded:
        raise SurgeryError(f"No tensor of {path} fits the model: {'; '.join(report.lines())}.")
    for name in report.loaded:
        wanted[name].copy_(found[name])
    return report


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, a checkpoint, or a model's folder; mapped into memory.

    Raises:
        SurgeryError: if there are no tensors, or a file holds other things than tensors.
    """
    if path.is_dir():
        if (path / INFO).is_file() and read_info(path).get("format") != "hf":
            return load_tensors(path / STATE_DICT)
        files = TensorFiles(path)
        return {name: files[name] for name in files.ranges}
    if not path.is_file():
        raise SurgeryError(f"{path} is not there. Give a file or folder of weights.")
    if path.suffix == ".safetensors":
        mapped = MappedFiles()
        return {name: mapped.tensor(place) for name, place in safetensors_ranges(path).items()}
    return load_tensors(path)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)
