"""A .pt file without its tensors' bytes: torch writes the zip file, and this keeps what is between the tensors.

In: the object to save. Out: a `Skeleton`, in memory, that says where each tensor's bytes go and gives the gaps between
them, with the CRCs that become known as the bytes pass by. Compared with what torch.save writes, the tensors come
first, those that several files share before all others: such files begin with the same bytes, which need to be hashed
and, on some file systems, stored only once. Every tensor starts at a multiple of `ALIGNMENT` bytes, and sets are
pickled sorted, so that the same object gives the same bytes in every process.

Sources: PyTorch's torch/serialization.py (`_save`: the records and the persistent ids) and
caffe2/serialize/inline_container.cc (the serialization id); the zip format's APPNOTE, sections 4.3.9 (data descriptor),
4.3.12 (central directory) and 4.3.14 to 4.3.16 (its end).
"""

import io
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import torch

ALIGNMENT = 4096  # what direct I/O and the sharing of extents ask for on every file system we know

Storage = torch.UntypedStorage


class Skeleton:
    """The zip file that holds `content`.

    Attributes:
        storages: those whose bytes are left out, in the file's order; `first` come first.
        starts: where each one's bytes start.
        size_bytes: the whole file's size.
    """

    def __init__(self, content: Any, first: Iterable[Storage] = ()):
        pickled, storages = _pickled(content, list(first))
        sink = _Sink()
        writer = torch._C.PyTorchFileWriter(sink, True, ALIGNMENT)  # type: ignore[call-overload]
        for key, storage in enumerate(storages):
            writer.write_record_metadata(f"data/{key}", storage.nbytes())
        for name, data in (
            ("data.pkl", pickled),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT).encode()),
            ("byteorder", sys.byteorder.encode()),
        ):
            writer.write_record(name, data, len(data))
        writer.write_end_of_file()
        self.storages = [storage for storage in storages if storage.nbytes()]
        self.starts = sink.skipped
        self.size_bytes = sink.position
        self._gaps = sink.gaps
        self._id = writer.serialization_id().encode()

    def gap(self, index: int) -> bytearray:
        """The bytes before tensor `index`, or behind the last one; `fill_in` those of the tensors before it first."""
        return self._gaps[index]

    def fill_in(self, index: int, crc: int) -> None:
        """Note the CRC-32 of tensor `index`, in the descriptor behind it and in the directory."""
        struct.pack_into("<I", self._gaps[index + 1], 4, crc)
        last = self._gaps[-1]
        entry = self._directory()[index]
        struct.pack_into("<I", last, entry + 16, crc)
        if index == len(self.storages) - 1:
            self._renew_id()

    def _directory(self) -> list[int]:
        """Where in the last gap the directory's entries start: of the tensors, then of all other records."""
        last = self._gaps[-1]
        end = len(last) - 22
        start = int.from_bytes(last[end + 16 : end + 20], "little")
        if start == 0xFFFFFFFF:
            (start,) = struct.unpack_from("<Q", last, end - 20 - 56 + 48)
        entry = start - (self.size_bytes - len(last))
        entries: list[int] = []
        empty: list[int] = []
        while last[entry : entry + 4] == b"PK\x01\x02":
            stored_bytes, name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<I4xHHH", last, entry + 20)
            (entries if stored_bytes else empty).append(entry)
            entry += 46 + name_bytes + extra_bytes + comment_bytes
        return entries

    def _renew_id(self) -> None:
        """torch ends the file with an id: 20 digits from the records' names, 20 from their CRCs, in their order."""
        last = self._gaps[-1]
        entries = self._directory()
        combined = 0
        for entry in entries[:-1]:
            (crc,) = struct.unpack_from("<I", last, entry + 16)
            combined ^= (crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)) & 0xFFFFFFFFFFFFFFFF
            combined &= 0xFFFFFFFFFFFFFFFF
        place = last.rindex(self._id)
        new_id = self._id[:20] + f"{combined:020d}".encode()
        last[place : place + 40] = new_id
        struct.pack_into("<I", last, place + 40 + 4, zlib.crc32(new_id))
        struct.pack_into("<I", last, entries[-1] + 16, zlib.crc32(new_id))
        self._id = new_id


class _Sink(io.RawIOBase):
    """What torch's writer takes for a file: keeps what is written, and where it skipped how much."""

    def __init__(self) -> None:
        self.position = 0
        self.gaps = [bytearray()]
        self.skipped: list[int] = []

    def write(self, data) -> int:
        self.gaps[-1] += data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR:
            raise io.UnsupportedOperation("only what is skipped can be passed over")
        self.skipped.append(self.position)
        self.gaps.append(bytearray())
        self.position += offset
        return self.position


def storages_of(content: Any) -> list[Storage]:
    """The storages of `content`, each once, in the order in which it pickles them."""
    return _pickled(content, [])[1]


def _pickled(content: Any, first: list[Storage]) -> tuple[bytes, list[Storage]]:
    """data.pkl, and the storages by the number it knows them under; `first` get the first numbers."""
    numbered: dict[int, tuple[int, Storage]] = {}

    def number(storage: Storage) -> int:
        return numbered.setdefault(storage._cdata, (len(numbered), storage))[0]

    class Pickler(_SortingPickler):
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


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined]  # the one in Python, whose `dispatch` can be changed


class _SortingPickler(_Pickler):
    """Python's own pickler, but for sets: their order depends on the process, so theirs is sorted."""

    dispatch = _Pickler.dispatch.copy()

    def _save_sorted(self, obj: set | frozenset) -> None:
        self.save_reduce(type(obj), (sorted(obj, key=repr),), obj=obj)

    dispatch[set] = _save_sorted
    dispatch[frozenset] = _save_sorted
