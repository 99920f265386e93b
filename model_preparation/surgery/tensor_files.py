"""The weights in a Hugging Face model folder, one tensor at a time.

In: a folder with model.safetensors or pytorch_model.bin, whole or in shards with an index. Out: names, where each
tensor lies (`TensorRange`), and tensors mapped from there, without building the model. Nothing is unpickled as code.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model_preparation.errors import SurgeryError
from model_preparation.surgery.tensor_ranges import MappedFiles, TensorRange, pt_ranges, safetensors_ranges

# In the order in which transformers looks for them.
_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class TensorFiles:
    """Tensors of the model in `folder`, by name.

    Attributes:
        ranges: where each tensor lies.

    Raises:
        SurgeryError: if there are no weights, a shard is missing, or a file cannot be read as tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped = MappedFiles()
        self.ranges: dict[str, TensorRange] = self._locate()

    def names(self) -> list[str]:
        """Every tensor's name, in the files' order."""
        return list(self.ranges)

    def paths(self) -> list[Path]:
        """The files the tensors are in, and their index where there is one."""
        return sorted({*(place.path for place in self.ranges.values()), *self.folder.glob("*.index.json")})

    def __contains__(self, name: str) -> bool:
        return name in self.ranges

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU, mapped from its file: nothing is read before it is used."""
        return self._mapped.tensor(self.ranges[name])

    def with_prefix(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(name without the prefix, tensor) of every tensor whose name starts with `prefix`."""
        for name in self.ranges:
            if name.startswith(prefix):
                yield name[len(prefix) :], self[name]

    def require(self, name: str, shape: torch.Size) -> None:
        """Raise SurgeryError unless there is a tensor of this name and shape."""
        if name not in self.ranges:
            raise SurgeryError(f"{self.folder} lacks {name}, which its config.json asks for. Check the model's folder.")
        found = self.ranges[name].shape
        if found != shape:
            raise SurgeryError(
                f"{name} in {self.folder} has shape {list(found)}, but its config.json asks for {list(shape)}. "
                "Check that the two belong together."
            )

    def dtype(self) -> torch.dtype:
        """The dtype that most of the numbers have."""
        counts: dict[torch.dtype, int] = {}
        for place in self.ranges.values():
            counts[place.dtype] = counts.get(place.dtype, 0) + place.shape.numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def _locate(self) -> dict[str, TensorRange]:
        for single, index in _SINGLE_AND_INDEX:
            if (self.folder / single).is_file():
                return _ranges_in(self.folder / single)
            if (self.folder / index).is_file():
                return self._locate_shards(self.folder / index)
        wanted = ", ".join(name for pair in _SINGLE_AND_INDEX for name in pair)
        raise SurgeryError(f"{self.folder} has no weights (none of {wanted}). Give a complete model folder.")

    def _locate_shards(self, index: Path) -> dict[str, TensorRange]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            path_of = {name: self.folder / shard for name, shard in weight_map.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise SurgeryError(f"{index} is not an index of shards. Download the file again.") from error
        ranges: dict[Path, dict[str, TensorRange]] = {}
        for path in sorted(set(path_of.values())):
            if path.parent != self.folder or path.name in ("", ".."):
                raise SurgeryError(f"{index} names {path}, which is outside the model's folder. Do not use this model.")
            if not path.is_file():
                raise SurgeryError(f"Shard {path} is missing. Download the model again.")
            ranges[path] = _ranges_in(path)
        for name, path in path_of.items():
            if name not in ranges[path]:
                raise SurgeryError(f"{path} lacks {name}, which {index.name} says it holds. Download the model again.")
        return {name: ranges[path][name] for name, path in path_of.items()}


def _ranges_in(path: Path) -> dict[str, TensorRange]:
    if path.suffix == ".safetensors":
        return safetensors_ranges(path)
    return pt_ranges(path, load_tensors(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The dict of tensors in a file that torch.save wrote, mapped from it.

    Raises:
        SurgeryError: if the file is not one, or holds anything but tensors by name.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SurgeryError(f"{path} cannot be read as tensors ({reason}). Make or download it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise SurgeryError(f"{path} holds something else than tensors by name. Make or download it again.")
    return tensors
