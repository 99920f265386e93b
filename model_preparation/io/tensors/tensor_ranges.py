"""Finds where tensors lie in files, so that their bytes can be copied or cast in pieces, without loading whole tensors.

Source of the safetensors layout: github.com/huggingface/safetensors, README, "Format".
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from model_preparation.errors import SurgeryError
from model_preparation.io.block_io import Place, read_into
from model_preparation.io.tensors.dtypes import DType, dtype_of
from model_preparation.io.tensors.quantisation import refusal
from model_preparation.io.untrusted.pt_check import pt_records, reading_tensors
from model_preparation.io.untrusted.untrusted_files import MAX_JSON_BYTES, check_fields, parse_json, regular_file

# torch is imported only where tensors are made or cast, so copying bytes does not wait for the import.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The safetensors names of the dtypes that a model can run in.
SAFETENSORS_DTYPES = {
    "F64": DType("float64", 8),
    "F32": DType("float32", 4),
    "F16": DType("float16", 2),
    "BF16": DType("bfloat16", 2),
}
_MAX_DIMENSIONS = 8


class _Stored:
    """Base class of the tensors below, which have `shape` and `dtype`."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def cast(self, dtype: "DType | torch.dtype | None") -> "Self | CastTensor":
        """This tensor, cast to `dtype` while it is read; the tensor itself for None or its own dtype."""
        wanted = self.dtype if dtype is None else dtype_of(dtype)
        return self if wanted == self.dtype else CastTensor(self, wanted)  # type: ignore[arg-type]  # a StoredTensor


@dataclass(frozen=True)
class TensorRange(_Stored):
    """A tensor's bytes in a file: `size_bytes` from `start` on, in C order."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def place(self) -> Place:
        """The file, and where in it the bytes start."""
        return self.path, self.start

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the tensor's bytes from `start` on; raises OSError if the file cannot be read."""
        read_into(self.path, self.start + start, view)

    def rows(self, start: int, end: int) -> "TensorRange":
        """The rows `tensor[start:end]` of this tensor."""
        count = max(0, min(end, self.shape[0]) - start)
        row_bytes = self.size_bytes // self.shape[0]
        return TensorRange(self.path, self.start + start * row_bytes, (count, *self.shape[1:]), self.dtype)


@dataclass(frozen=True)
class CastTensor(_Stored):
    """A stored tensor, cast to `dtype` while it is read."""

    stored: "StoredTensor"
    dtype: DType
    place = None  # no file holds these bytes

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.stored.shape

    def read_into(self, view: memoryview, start: int) -> None:
        """As `TensorRange.read_into`; `start` and the view's length must be multiples of the dtype's size."""
        import torch

        raw = bytearray(len(view) // self.dtype.itemsize * self.stored.dtype.itemsize)
        self.stored.read_into(memoryview(raw), start // self.dtype.itemsize * self.stored.dtype.itemsize)
        view[:] = bytes_of(torch.frombuffer(raw, dtype=self.stored.dtype.torch).to(self.dtype.torch))


@dataclass(frozen=True)
class PickedTensor(_Stored):
    """Some rows (dimension 0) or columns (dimension 1) of a matrix in a file, or some numbers of a vector.

    Use it for small parts: the whole matrix is read once, and the picked part stays in memory.
    """

    stored: TensorRange
    picked: tuple[int, ...]
    dimension: int
    place = None  # no file holds these bytes

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        whole = self.stored.shape
        return (*whole[: self.dimension], len(self.picked), *whole[self.dimension + 1 :])

    @cached_property
    def contents(self) -> bytes:
        """All bytes in C order; raises OSError if the file cannot be read."""
        import numpy as np

        whole = bytearray(self.stored.size_bytes)
        self.stored.read_into(memoryview(whole), 0)
        matrix = np.frombuffer(whole, np.uint8).reshape(*self.stored.shape, self.dtype.itemsize)
        return matrix.take(self.picked, self.dimension).tobytes()

    def read_into(self, view: memoryview, start: int) -> None:
        """As `TensorRange.read_into`."""
        view[:] = self.contents[start : start + len(view)]


StoredTensor = TensorRange | PickedTensor


class MappedFiles:
    """Maps files into memory and gives their tensors. A tensor is read when it is used; `forget` frees its memory."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, place: "StoredTensor") -> "Tensor":
        """The tensor at `place`, on the CPU; writing to it changes no file."""
        import torch

        dtype = place.dtype.torch
        if not place.size_bytes:
            return torch.empty(place.shape, dtype=dtype)
        if isinstance(place, PickedTensor):
            return torch.frombuffer(bytearray(place.contents), dtype=dtype).view(place.shape)
        if place.path not in self._maps:
            with place.path.open("rb") as file:
                self._maps[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._maps[place.path], dtype=dtype, count=place.numel, offset=place.start)
        return flat.view(place.shape)

    def expect(self, place: TensorRange) -> None:
        """Ask the system to read `place` ahead, because reading it page by page is slow."""
        if place.path in self._maps and hasattr(mmap, "MADV_WILLNEED"):
            first = place.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[place.path].madvise(mmap.MADV_WILLNEED, first, place.start + place.size_bytes - first)

    def forget(self, place: TensorRange) -> None:
        """Free the memory of `place`; the next use reads it again."""
        if place.path not in self._maps or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE  # other tensors may share the first and last page
        size_bytes = (place.start + place.size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size_bytes > 0:
            self._maps[place.path].madvise(mmap.MADV_DONTNEED, first, size_bytes)


def range_of(place: TensorRange) -> tuple[int, int]:
    """(start, end) of a tensor in its file, in bytes."""
    return place.start, place.start + place.size_bytes


def bytes_of(tensor: "Tensor") -> memoryview:
    """A tensor's bytes in C order."""
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def safetensors_ranges(path: Path) -> dict[str, TensorRange]:
    """Where each tensor of a safetensors file lies, by name, in the file's order.

    Raises:
        SurgeryError: if the header is not valid, if no model can run in a dtype, or if tensor ranges
            overlap or leave gaps.
    """
    try:
        size_bytes = regular_file(path).stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_JSON_BYTES, size_bytes - 8):
                raise ValueError(f"the header's length is {header_bytes}")
            header = parse_json(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(name, entry)
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise refusal(path, f"{entry['dtype']:.40}", header)
        found = {}
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            tensor = TensorRange(
                path, 8 + header_bytes + begin, tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]]
            )
            if begin != position or end - begin != tensor.size_bytes:
                raise ValueError(f"{name:.100} starts or ends at the wrong byte")
            found[name] = tensor
            position = end
        if 8 + header_bytes + position != size_bytes:
            raise ValueError(f"it is {size_bytes} bytes long instead of {8 + header_bytes + position}")
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be read as tensors ({error}). Make or download it again.") from error
    return found


def _check_entry(name: str, entry: object) -> None:
    """Raise ValueError unless a tensor's header entry has all fields, and numbers that are possible in a file."""
    if not isinstance(entry, dict):
        raise ValueError(f"the header entry of {name:.100} is not a JSON object")
    check_fields(entry, {"dtype": str, "shape": list, "data_offsets": list})
    shape, offsets = entry["shape"], entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in [*shape, *offsets]):
        raise ValueError(f"{name:.100} has a shape or offset that is not an integer between 0 and 2**63 - 1")
    if len(offsets) != 2:
        raise ValueError(f"{name:.100} has {len(offsets)} data_offsets instead of 2")
    if len(shape) > _MAX_DIMENSIONS or math.prod(shape) >= 1 << 60:
        raise ValueError(f"{name:.100} has more than {_MAX_DIMENSIONS} dimensions, or 2**60 numbers or more")


def pt_ranges(path: Path, tensors: "Mapping[str, Tensor]") -> dict[str, TensorRange]:
    """Where the tensors lie in the file from which `torch.load(path, mmap=True)` returned them, by name.

    torch maps the whole file at once, so storages have the same order and distances in memory as in the file.

    Args:
        tensors: all tensors of the file. They must use every storage in it.

    Raises:
        SurgeryError: if a tensor is not contiguous, or if the storages in memory do not match the file.
    """
    with reading_tensors(path):
        records = pt_records(path)
    places = sorted(
        (record.start, record.size_bytes)
        for name, record in records.items()
        if name.startswith("data/") and record.size_bytes
    )
    used = [tensor.untyped_storage() for tensor in tensors.values()]
    storages = {storage.data_ptr(): storage.nbytes() for storage in used if storage.nbytes()}
    pointers = sorted(storages)
    mapped_at = pointers[0] - places[0][0] if pointers and places else 0
    if [(pointer - mapped_at, storages[pointer]) for pointer in pointers] != places:
        raise SurgeryError(f"{path} has storages that do not match its tensors. Save it again with torch.save.")
    found: dict[str, TensorRange] = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise SurgeryError(
                f"Tensor {name} in {path} is not contiguous (transposed, strided or expanded). "
                f"Save {name}.contiguous() instead."
            )
        start = tensor.data_ptr() - mapped_at if tensor.numel() else 0
        found[name] = TensorRange(path, start, tuple(tensor.shape), dtype_of(tensor.dtype))
    with path.open("rb") as file:
        for name, place in found.items():  # torch swaps bytes if the file has another byte order
            file.seek(place.start)
            beginning = bytes_of(tensors[name].reshape(-1)[:8])
            if file.read(len(beginning)) != beginning:
                raise SurgeryError(f"{path} does not hold {name} where it should. Save it again with torch.save.")
    return found
