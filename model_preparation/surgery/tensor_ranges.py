"""Where tensors lie in files: so that their bytes can be copied without being loaded.

In: a safetensors file, or one that torch.save wrote. Out: per tensor a `TensorRange`, which reads it piece
by piece, cast if asked for. Source of the safetensors layout: github.com/huggingface/safetensors, README, "Format".
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model_preparation.errors import SurgeryError
from model_preparation.surgery.block_io import Place, read_into

# The safetensors header's names of the dtypes whose arithmetic a model can run in.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorRange:
    """A tensor's bytes: `size_bytes` of them from `start` on, in C order."""

    path: Path
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def place(self) -> Place:
        """The file, and where in it the bytes start."""
        return self.path, self.start

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the tensor's bytes from `start` on; raises OSError if the file cannot be read."""
        read_into(self.path, self.start + start, view)

    def rows(self, start: int, end: int) -> "TensorRange":
        """The part of the tensor that `tensor[start:end]` is."""
        count = max(0, min(end, self.shape[0]) - start)
        row_bytes = self.size_bytes // self.shape[0]
        return TensorRange(self.path, self.start + start * row_bytes, torch.Size([count, *self.shape[1:]]), self.dtype)

    def cast(self, dtype: torch.dtype | None) -> "TensorRange | CastTensor":
        """The same numbers, as `dtype` if that is given and another one."""
        return self if dtype in (None, self.dtype) else CastTensor(self, dtype)


@dataclass(frozen=True)
class CastTensor:
    """A tensor in a file that is cast to `dtype` piece by piece while it is read."""

    stored: TensorRange
    dtype: torch.dtype
    place = None  # nowhere are the bytes as they are read here

    @property
    def size_bytes(self) -> int:
        return self.stored.shape.numel() * self.dtype.itemsize

    def read_into(self, view: memoryview, start: int) -> None:
        """As `TensorRange.read_into`; `start` and the view's length are whole numbers of elements."""
        raw = bytearray(len(view) // self.dtype.itemsize * self.stored.dtype.itemsize)
        self.stored.read_into(memoryview(raw), start // self.dtype.itemsize * self.stored.dtype.itemsize)
        view[:] = bytes_of(torch.frombuffer(raw, dtype=self.stored.dtype).to(self.dtype))


class MappedFiles:
    """Tensors that stay in their files: mapped, read when used, and let go of on request."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, place: TensorRange) -> Tensor:
        """The tensor at `place`, on the CPU; writing to it changes no file."""
        if not place.size_bytes:
            return torch.empty(place.shape, dtype=place.dtype)
        if place.path not in self._maps:
            with place.path.open("rb") as file:
                self._maps[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = place.shape.numel()
        flat = torch.frombuffer(self._maps[place.path], dtype=place.dtype, count=count, offset=place.start)
        return flat.view(place.shape)

    def expect(self, place: TensorRange) -> None:
        """Let the system read what lies at `place` ahead of its use: page by page would be slow."""
        if place.path in self._maps and hasattr(mmap, "MADV_WILLNEED"):
            first = place.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[place.path].madvise(mmap.MADV_WILLNEED, first, place.start + place.size_bytes - first)

    def forget(self, place: TensorRange) -> None:
        """Let the system take back the memory behind `place`; it is read again when it is used again."""
        if place.path not in self._maps or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: their ends may be others'
        size_bytes = (place.start + place.size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size_bytes > 0:
            self._maps[place.path].madvise(mmap.MADV_DONTNEED, first, size_bytes)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in C order."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def safetensors_ranges(path: Path) -> dict[str, TensorRange]:
    """Every tensor of a safetensors file, in the file's order.

    Raises:
        SurgeryError: if the header is not one, or its ranges do not fill the file exactly, without overlaps.
    """
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size_bytes - 8):
                raise ValueError(f"the header's length is {header_bytes}")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        found = {}
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            tensor = TensorRange(path, 8 + header_bytes + begin, torch.Size(entry["shape"]), _dtype(entry, path))
            if begin != position or end - begin != tensor.size_bytes:
                raise ValueError(f"{name} does not lie where it should")
            found[name] = tensor
            position = end
        if 8 + header_bytes + position != size_bytes:
            raise ValueError(f"it is {size_bytes} bytes long instead of {8 + header_bytes + position}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SurgeryError(f"{path} cannot be read as tensors ({error}). Make or download it again.") from error
    return found


def pt_ranges(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorRange]:
    """Where the tensors that `torch.load(path, mmap=True)` gave lie in the file.

    The file is mapped as one piece, so the distance between two tensors in memory is that in the file; torch numbers
    storages in the order of the dict, and its reader says where the first one is.

    Raises:
        SurgeryError: if a tensor is not contiguous, or lies outside the file.
    """
    reader = torch._C.PyTorchFileReader(str(path))  # type: ignore[call-arg]
    size_bytes = path.stat().st_size
    found: dict[str, TensorRange] = {}
    mapped_at: int | None = None
    for name, tensor in tensors.items():
        if mapped_at is None:
            first = tensor.untyped_storage().data_ptr()
            mapped_at = first - reader.get_record_offset("data/0")  # type: ignore[attr-defined]
        start = tensor.data_ptr() - mapped_at
        if not tensor.is_contiguous() or not 0 <= start <= size_bytes - tensor.nbytes:
            raise SurgeryError(f"{path} holds {name} in a way that cannot be copied. Save it again with torch.save.")
        found[name] = TensorRange(path, start, tensor.shape, tensor.dtype)
    with path.open("rb") as file:
        for name, place in found.items():
            file.seek(place.start)
            beginning = bytes_of(tensors[name].reshape(-1)[:8])
            if file.read(len(beginning)) != beginning:
                raise SurgeryError(f"{path} does not hold {name} where it should. Save it again with torch.save.")
    return found


def _dtype(entry: dict, path: Path) -> torch.dtype:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        wanted = ", ".join(SAFETENSORS_DTYPES)
        raise SurgeryError(
            f"{path} holds {entry['dtype']} numbers; these can be used: {wanted}. Take an unquantised model."
        )
    return SAFETENSORS_DTYPES[entry["dtype"]]
