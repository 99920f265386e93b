"""Reads the weights in a Hugging Face model folder, one tensor at a time, without building the model.

The folder has model.safetensors or pytorch_model.bin, as one file or as shards with an index. No code in a
pickle is run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.quantisation import GIVE_UNQUANTISED, method_in_names, refusal
from model_preparation.io.tensors.tensor_ranges import (
    SAFETENSORS_DTYPES,
    MappedFiles,
    TensorRange,
    pt_ranges,
    safetensors_ranges,
)
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.pickle_check import TENSORS
from model_preparation.io.untrusted.pt_check import check_pt, reading_tensors
from model_preparation.io.untrusted.untrusted_files import inside, read_json

if TYPE_CHECKING:
    from torch import Tensor

# In the order in which transformers looks for them.
_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class TensorFiles:
    """The tensors of the model in `folder`; `ranges` says where each tensor lies, by name.

    Raises:
        SurgeryError: if there are no weights, a shard is missing, or a file cannot be read as tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped = MappedFiles()
        self.ranges: dict[str, TensorRange] = self._locate()

    def paths(self) -> list[Path]:
        """The tensors' files, and their index if there is one."""
        return sorted({*(place.path for place in self.ranges.values()), *self.folder.glob("*.index.json")})

    def __contains__(self, name: str) -> bool:
        return name in self.ranges

    def __getitem__(self, name: str) -> "Tensor":
        """One tensor, on the CPU. It is read from its file when it is used."""
        return self._mapped.tensor(self.ranges[name])

    def with_prefix(self, prefix: str) -> "Iterator[tuple[str, Tensor]]":
        """(name without `prefix`, tensor) for every name with that prefix."""
        for name in self.ranges:
            if name.startswith(prefix):
                yield name[len(prefix) :], self[name]

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise SurgeryError unless there is a floating-point tensor with this name and shape."""
        if name not in self.ranges:
            if method := method_in_names(self.ranges):
                raise SurgeryError(f"{self.folder} holds tensors quantised by {method}. {GIVE_UNQUANTISED}")
            raise SurgeryError(f"{self.folder} lacks {name}, which its config.json asks for. Check the model's folder.")
        if self.ranges[name].dtype not in SAFETENSORS_DTYPES.values():
            raise refusal(self.folder, self.ranges[name].dtype.name, self.ranges)
        found = self.ranges[name].shape
        if found != shape:
            raise SurgeryError(
                f"{name} in {self.folder} has shape {list(found)}, but its config.json asks for {list(shape)}. "
                "Check that config.json and the weights belong together."
            )

    def dtype(self) -> DType:
        """The dtype that most numbers of the model have."""
        counts: dict[DType, int] = {}
        for place in self.ranges.values():
            counts[place.dtype] = counts.get(place.dtype, 0) + place.numel
        return max(counts, key=lambda dtype: counts[dtype])

    def _locate(self) -> dict[str, TensorRange]:
        for single, index in _SINGLE_AND_INDEX:
            if (self.folder / single).is_file():
                return _ranges_in(self.folder / single)
            if (self.folder / index).is_file():
                return self._locate_shards(self.folder / index)
        wanted = ", ".join(name for pair in _SINGLE_AND_INDEX for name in pair)
        raise SurgeryError(
            what_it_is(self.folder) or f"{self.folder} has no weights (none of {wanted}). Give a complete model folder."
        )

    def _locate_shards(self, index: Path) -> dict[str, TensorRange]:
        try:
            weight_map = read_json(index)["weight_map"]
            path_of = {name: inside(self.folder, shard) for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{index} is not an index of shards ({error}). Download the file again.") from error
        ranges: dict[Path, dict[str, TensorRange]] = {}
        for path in sorted(set(path_of.values())):
            if not path.exists():
                raise SurgeryError(what_it_is(self.folder) or f"Shard {path} is missing. Download the model again.")
            ranges[path] = _ranges_in(path)
        for name, path in path_of.items():
            if name not in ranges[path]:
                raise SurgeryError(f"{path} lacks {name}, but {index.name} lists it there. Download the model again.")
        return {name: ranges[path][name] for name, path in path_of.items()}


def _ranges_in(path: Path) -> dict[str, TensorRange]:
    if path.suffix == ".safetensors":
        return safetensors_ranges(path)
    return pt_ranges(path, load_tensors(path))


def load_tensors(path: Path, advice: str = "Make or download it again.") -> "dict[str, Tensor]":
    """The dict of tensors in a file that torch.save wrote. A tensor is read from the file when it is used.

    Args:
        advice: the last sentence of the error's message.

    Raises:
        SurgeryError: if torch.save did not write the file, if it names a global that could run code, or if it holds
            anything except tensors by name, each within a record of this file.
    """
    import torch  # here, because safetensors files do not need it

    with reading_tensors(path, advice):
        check_pt(path, TENSORS)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise ValueError("it holds other things than tensors by name")
        for name, tensor in tensors.items():
            _check_view(name, tensor)
    return tensors


def _check_view(name: str, tensor: "Tensor") -> None:
    """Raise ValueError unless the tensor lies within its storage, and has no more bytes than the storage."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name:.100} is not a dense tensor on the CPU")
    stored_bytes = tensor.untyped_storage().nbytes()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end_bytes = (tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
    if max(end_bytes, tensor.nbytes) > stored_bytes:
        raise ValueError(f"{name:.100} needs {max(end_bytes, tensor.nbytes)} bytes, but its storage has {stored_bytes}")
