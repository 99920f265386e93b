"""Makes all bytes of a .pt file except the tensors: the zip structure, as torch.save writes it, and the pickle.

Only the pickle needs torch, so the tensors can be written while another thread imports torch. Unlike
torch.save, this module puts the tensors first. Tensors that several files share come before all others, so
these files begin with the same bytes. The same bytes are hashed only once and, on some file systems, stored
only once. Every tensor starts at a multiple of `ALIGNMENT` bytes. Sets are sorted before they are pickled, so
the same object gives the same bytes in every process.

Sources: PyTorch's torch/serialization.py (`_save`: the records and the persistent ids) and
caffe2/serialize/inline_container.cc (the other records, the padding); the zip format's APPNOTE, sections 4.3.7
(local header), 4.3.9 (data descriptor), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end), 4.5.3 (zip64).
"""

import hashlib
import io
import pickle
import struct
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from zlib_ng.zlib_ng import crc32

from model_preparation.io.block_io import ALIGNMENT

if TYPE_CHECKING:
    import torch

    Storage = torch.UntypedStorage

_FOLDER = "archive"  # the folder in the zip file that holds all records
_FULL = 0xFFFFFFFF  # in a field of 32 bits, it means that a zip64 field has the number
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4sQ2H2I4Q4sIQI4s4H2IH")  # the zip64 end record, its locator, and the ordinary end record
_UTF8, _SIZES_FOLLOW = 0x0800, 0x0008  # flags: the name is UTF-8; the sizes follow the data


class Archive:
    """The structure of a zip file, which has `position` bytes so far.

    For each tensor, write `begin_tensor`, the tensor's bytes and `finish_tensor`. Write `end` last.
    """

    def __init__(self) -> None:
        self.position = 0
        self._directory: list[bytes] = []
        self._crcs: list[int] = []
        self._begun: tuple[bytes, int, int] = (b"", 0, 0)  # name, start of the header, size

    def copy(self) -> "Archive":
        """A second archive with the same beginning."""
        other = Archive()
        other.position, other._directory, other._crcs = self.position, self._directory.copy(), self._crcs.copy()
        return other

    def begin_tensor(self, size_bytes: int) -> bytes:
        """The bytes before the next tensor."""
        return self._begin(f"data/{len(self._directory)}", size_bytes)

    def finish_tensor(self, crc: int) -> bytes:
        """The bytes after the tensor, with its CRC-32."""
        name, start, size_bytes = self._begun
        flags = _UTF8 | (_SIZES_FOLLOW if size_bytes else 0)
        wide = _wide(size_bytes, size_bytes, start)
        sizes = min(size_bytes, _FULL), min(size_bytes, _FULL)
        entry = _ENTRY.pack(
            *(b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc, *sizes, len(name), len(wide), 0, 0, 0, 0, min(start, _FULL))
        )
        self._directory.append(entry + name + wide)
        self._crcs.append(crc)
        if not size_bytes:
            return b""
        descriptor = struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\x07\x08", crc, size_bytes, size_bytes)
        self.position += len(descriptor)
        return descriptor

    def end(self, pickled: bytes) -> bytes:
        """All bytes after the last tensor."""
        records = {
            "data.pkl": pickled,
            ".format_version": b"1",
            ".storage_alignment": str(ALIGNMENT).encode(),
            "byteorder": sys.byteorder.encode(),
            "version": b"3\n",
        }
        end = b"".join(self._record(name, data) for name, data in records.items())
        identity = hashlib.sha256(repr(self._crcs).encode()).digest()
        end += self._record(".data/serialization_id", f"{int.from_bytes(identity[:16], 'big'):040d}".encode())
        count, start, directory = len(self._directory), self.position, b"".join(self._directory)
        end64 = (b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, len(directory), start)
        locator = (b"PK\x06\x07", 0, start + len(directory), 1)
        short = (b"PK\x05\x06", 0, 0, count, count, len(directory), min(start, _FULL), 0)
        return end + directory + _END.pack(*end64, *locator, *short)

    def _record(self, name: str, data: bytes) -> bytes:
        return self._begin(name, len(data)) + data + self.finish_tensor(crc32(data))

    def _begin(self, name: str, size_bytes: int) -> bytes:
        path, start = f"{_FOLDER}/{name}".encode(), self.position
        self._begun = path, start, size_bytes
        extra = _wide(size_bytes, 0, start)
        data_start = start + _LOCAL.size + len(path) + len(extra) + 4
        padding_bytes = -data_start % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding_bytes) + b"Z" * padding_bytes
        flags = _UTF8 | (_SIZES_FOLLOW if size_bytes else 0)
        self.position = data_start + padding_bytes + size_bytes
        return _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra


def _wide(size_bytes: int, packed_bytes: int, start: int) -> bytes:
    """The zip64 field with the numbers that need more than 32 bits; empty if no number does."""
    numbers = [size_bytes, packed_bytes] if size_bytes >= _FULL else []
    numbers += [start] if start >= _FULL else []
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined]  # written in Python: its `dispatch` can be changed


class SortingPickler(_Pickler):
    """Python's pickler, but it sorts sets, because their order differs between processes."""

    dispatch = _Pickler.dispatch.copy()

    def _save_sorted(self, obj: set | frozenset) -> None:
        self.save_reduce(type(obj), (sorted(obj, key=repr),), obj=obj)

    dispatch[set] = _save_sorted
    dispatch[frozenset] = _save_sorted


def pickled(
    content: Any, first: "Iterable[Storage]" = (), pickler: Any = SortingPickler
) -> "tuple[bytes, list[Storage]]":
    """Pickle `content`. Return data.pkl and its numbered storages: `first`, then the others in pickling order."""
    import torch

    numbered: dict[int, tuple[int, Storage]] = {}

    def number(storage: "Storage") -> int:
        return numbered.setdefault(storage._cdata, (len(numbered), storage))[0]

    class Pickler(pickler):
        def persistent_id(self, obj: Any) -> tuple | None:
            if isinstance(obj, torch.storage.TypedStorage):
                storage_type = getattr(torch, obj._pickle_storage_type())
                return "storage", storage_type, str(number(obj._untyped_storage)), "cpu", obj._size()
            if isinstance(obj, torch.UntypedStorage):
                return "storage", type(obj), str(number(obj)), "cpu", obj.nbytes()
            return None

    for storage in first:
        number(storage)
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue(), [storage for _, storage in numbered.values()]
