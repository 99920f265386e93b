"""The weights in a Hugging Face model folder, one tensor at a time.

In: a folder with model.safetensors or pytorch_model.bin, whole or in shards with an index. Out: names, and tensors read
when asked for, without building the model. Files are memory-mapped and never unpickled as code.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_preparation.errors import SurgeryError

# In the order in which transformers looks for them.
_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# The safetensors header's names of the dtypes whose arithmetic a model can run in.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFiles:
    """Tensors of the model in `folder`, by name.

    Raises:
        SurgeryError: if there are no weights, a shard is missing, or a file cannot be read as tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[Path, object] = {}
        self._file_of = self._locate()

    def names(self) -> list[str]:
        """Every tensor's name, in the files' order."""
        return list(self._file_of)

    def paths(self) -> list[Path]:
        """The files the tensors are in, and their index where there is one."""
        return sorted({*self._file_of.values(), *self.folder.glob("*.index.json")})

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU, in a storage of its own size."""
        path = self._file_of[name]
        try:
            tensor = self._reader(path)[name] if path.suffix == ".bin" else self._reader(path).get_tensor(name)
        except (SafetensorError, KeyError) as error:
            raise SurgeryError(f"{path} has no readable tensor {name}. Download the file again.") from error
        # A view into a shared storage would drag the whole of it into every file it is saved to.
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    def with_prefix(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(name without the prefix, tensor) of every tensor whose name starts with `prefix`."""
        for name in self._file_of:
            if name.startswith(prefix):
                yield name[len(prefix) :], self[name]

    def shape_and_dtype(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """What `self[name]` would have, without reading the tensor."""
        path = self._file_of[name]
        if path.suffix == ".bin":
            return self[name].shape, self[name].dtype  # mapped, so nothing is read either
        try:
            header = self._reader(path).get_slice(name)
        except SafetensorError as error:
            raise SurgeryError(f"{path} has no readable tensor {name}. Download the file again.") from error
        return torch.Size(header.get_shape()), _dtype_named(header.get_dtype(), path)

    def dtype(self) -> torch.dtype:
        """The dtype that most of the numbers have."""
        counts: dict[torch.dtype, int] = {}
        for name in self._file_of:
            shape, dtype = self.shape_and_dtype(name)
            counts[dtype] = counts.get(dtype, 0) + shape.numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def _locate(self) -> dict[str, Path]:
        for single, index in _SINGLE_AND_INDEX:
            if (self.folder / single).is_file():
                return dict.fromkeys(self._names_in(self.folder / single), self.folder / single)
            if (self.folder / index).is_file():
                return self._locate_shards(self.folder / index)
        wanted = ", ".join(name for pair in _SINGLE_AND_INDEX for name in pair)
        raise SurgeryError(f"{self.folder} has no weights (none of {wanted}). Give a complete model folder.")

    def _locate_shards(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            file_of = {name: self.folder / shard for name, shard in weight_map.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise SurgeryError(f"{index} is not an index of shards. Download the file again.") from error
        for path in sorted(set(file_of.values())):
            if path.parent != self.folder or path.name in ("", ".."):
                raise SurgeryError(f"{index} names {path}, which is outside the model's folder. Do not use this model.")
            if not path.is_file():
                raise SurgeryError(f"Shard {path} is missing. Download the model again.")
        return file_of

    def _names_in(self, path: Path) -> list[str]:
        reader = self._reader(path)
        return list(reader.keys())  # type: ignore[attr-defined]

    def _reader(self, path: Path):
        if path not in self._open:
            try:
                if path.suffix == ".bin":
                    self._open[path] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                else:
                    self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise SurgeryError(f"{path} cannot be read as tensors ({reason}). Download it again.") from error
        return self._open[path]


def _dtype_named(name: str, path: Path) -> torch.dtype:
    if name not in _DTYPES:
        wanted = ", ".join(_DTYPES)
        raise SurgeryError(f"{path} holds {name} numbers; these can be used: {wanted}. Take an unquantised model.")
    return _DTYPES[name]
