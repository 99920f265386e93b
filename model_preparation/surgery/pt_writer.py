"""Files that torch.save would have written, without having the tensors in memory.

In: objects whose tensors are placeholders (`placeholder`), and where each tensor's bytes come from. Out: the same bytes
torch.save writes, at the speed of the disk: torch writes the skeleton (zip directory and pickle, without tensor bytes),
then every source block is read once and goes into all files that hold that tensor, front to back, while each file's
SHA-256 and the zip's CRCs are worked out on the way. A few blocks are in memory at a time, whatever the model's size.

Sources: PyTorch's `torch.serialization.skip_data`; caffe2/serialize/inline_container.cc for the serialization id; the
zip format's APPNOTE, sections 4.3.9 (data descriptor) and 4.3.12 (central directory).
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import pickle
import queue
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

BLOCK_BYTES = 4 << 20  # a multiple of every file system's block, as direct I/O asks for
_BLOCKS_PER_FILE = 3  # one being filled, one being written, one in between

Blocks = Callable[[], Iterable[memoryview]]  # gives one tensor's bytes, in order, in pieces of any size


def placeholder(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor with a storage of its own that is address space only: nothing may read or write it."""
    return torch.empty(tuple(shape), dtype=dtype)


def write_together(
    contents: Mapping[Path, Any],
    blocks_of: Mapping[int, Blocks],
    advance: Callable[[int], None] = lambda size_bytes: None,
) -> dict[Path, dict]:
    """Write each of `contents` to its path, as `torch.save` would, and sync it.

    Args:
        contents: an object per path. Those that hold the same tensors must pickle them in the same order.
        blocks_of: by `data_ptr()` of a placeholder's storage, its bytes; every other tensor is taken from memory.
        advance: told the bytes of every piece written.

    Returns:
        {"bytes": size, "sha256": digest} per path.

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    files = [_File(path, content) for path, content in contents.items()]
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(Output(file.path, file.size_bytes, advance)) for file in files]
        for file, output in zip(files, outputs, strict=True):
            file.copy_gap(output)
        while pending := [index for index, file in enumerate(files) if file.next_storage is not None]:
            storage = _next_shared_storage([files[index] for index in pending])
            takers = [(files[index], outputs[index]) for index in pending if files[index].next_storage is storage]
            pointer = storage.data_ptr()
            blocks = blocks_of[pointer]() if pointer in blocks_of else [_bytes_of(storage)]
            crc = size_bytes = 0
            for block in blocks:
                crc = zlib.crc32(block, crc)
                size_bytes += block.nbytes
                for _, output in takers:
                    output.write(block)
            for file, output in takers:
                file.finish_record(size_bytes, crc)
                file.copy_gap(output)
        return {file.path: output.finish() for file, output in zip(files, outputs, strict=True)}


def _next_shared_storage(files: list["_File"]) -> torch.UntypedStorage:
    """The storage to write next: first in line in every file that still needs it."""
    for file in files:
        storage = file.next_storage
        assert storage is not None
        if all(storage is other.next_storage or not other.needs(storage) for other in files):
            return storage
    raise RuntimeError("the objects written together pickle their tensors in different orders")


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # type: ignore[arg-type]


@dataclass
class _Record:
    """An entry of the zip file. `crc` is None until a tensor's bytes have been seen."""

    name: str
    start: int  # of its data, in bytes from the file's start
    size_bytes: int
    directory_entry: int  # where its entry in the central directory starts
    crc: int | None
    storage: torch.UntypedStorage | None

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


class _File:
    """The skeleton of one file, walked from front to back: gaps that torch wrote, and tensors still to come."""

    def __init__(self, path: Path, content: Any):
        self.path = path
        try:
            with skip_data():
                torch.save(content, path)
        except RuntimeError as error:  # torch's writer tells a full disk in its own words
            raise OSError(errno.EIO, "It cannot be written; is the disk full?", str(path)) from error
        self.size_bytes = path.stat().st_size
        self._records = self._read_directory(_storages_in_order(content))
        self._tensors = [record for record in self._records if record.storage is not None]
        self._next = 0
        self._position = 0
        self._waiting = {id(record.storage) for record in self._tensors}
        self._gaps = self._read_gaps()

    @property
    def next_storage(self) -> torch.UntypedStorage | None:
        """The storage whose bytes come next; None when only the end of the file is left."""
        return self._tensors[self._next].storage if self._next < len(self._tensors) else None

    def needs(self, storage: torch.UntypedStorage | None) -> bool:
        """Whether the storage's bytes are still to come."""
        return id(storage) in self._waiting

    def finish_record(self, size_bytes: int, crc: int) -> None:
        """Note that the next storage's bytes have been written."""
        record = self._tensors[self._next]
        if size_bytes != record.size_bytes:
            raise RuntimeError(f"{record.name} in {self.path} got {size_bytes} bytes instead of {record.size_bytes}")
        record.crc = crc
        self._waiting.discard(id(record.storage))
        self._position = record.end
        self._next += 1

    def copy_gap(self, output: "Output") -> None:
        """Write what torch put between here and the next tensor, with the CRCs known by now."""
        tensors_left = self._next < len(self._tensors)
        gap = self._gaps[self._next]
        if not tensors_left:
            self._put_serialization_id(gap)
        for record in self._records:
            if record.crc is not None:
                self._patch(gap, record.end + 4, struct.pack("<I", record.crc))  # behind the descriptor's signature
                self._patch(gap, record.directory_entry + 16, struct.pack("<I", record.crc))
        output.write(memoryview(gap))

    def _read_gaps(self) -> list[bytearray]:
        """The bytes before, between and behind the tensors."""
        starts = [0, *(record.end for record in self._tensors)]
        ends = [*(record.start for record in self._tensors), self.size_bytes]
        gaps = []
        with self.path.open("rb") as file:
            for start, end in zip(starts, ends, strict=True):
                file.seek(start)
                gaps.append(bytearray(file.read(end - start)))
        return gaps

    def _patch(self, gap: bytearray, place: int, value: bytes) -> None:
        start = place - self._position
        if 0 <= start <= len(gap) - len(value):
            gap[start : start + len(value)] = value

    def _put_serialization_id(self, gap: bytearray) -> None:
        """torch ends the file with an id: 20 digits from the records' names, 20 from their CRCs."""
        last = self._records[-1]
        combined = 0
        for record in self._records[:-1]:
            assert record.crc is not None
            combined ^= (record.crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)) & 0xFFFFFFFFFFFFFFFF
            combined &= 0xFFFFFFFFFFFFFFFF
        start = last.start - self._position
        names_half = bytes(gap[start : start + 20])
        content = names_half + f"{combined:020d}".encode()
        self._patch(gap, last.start, content)
        last.crc = zlib.crc32(content)

    def _read_directory(self, storages: list[torch.UntypedStorage]) -> list[_Record]:
        reader = torch._C.PyTorchFileReader(str(self.path))
        records = []
        with zipfile.ZipFile(self.path) as archive:
            entry = archive.start_dir
            for info in archive.infolist():
                name = info.filename.partition("/")[2]
                key = name.removeprefix("data/") if name.startswith("data/") else ""
                storage = storages[int(key)] if key.isdigit() else None
                start = reader.get_record_offset(name)  # type: ignore[attr-defined]
                crc = None if storage is not None else info.CRC
                records.append(_Record(name, start, info.file_size, entry, crc, storage))
                entry += 46 + len(info.filename.encode()) + len(info.extra) + len(info.comment)
        return records


def _storages_in_order(content: Any) -> list[torch.UntypedStorage]:
    """The storages of `content` in the order in which torch.save numbers them."""
    order: dict[int, torch.UntypedStorage] = {}

    class Recorder(pickle.Pickler):
        def persistent_id(self, obj):
            if not torch.is_storage(obj):
                return None
            storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
            order.setdefault(storage._cdata, storage)
            return "storage"

    Recorder(_Nowhere(), protocol=2).dump(content)
    return list(order.values())


class _Nowhere:
    def write(self, data) -> int:
        return len(data)


class Output:
    """A file of known size written front to back, its SHA-256 worked out on the way by a thread of its own.

    Full blocks go to the disk directly where the file system allows it: through the page cache they would be copied
    once more and push out what others read.
    """

    def __init__(self, path: Path, size_bytes: int, advance: Callable[[int], None]):
        self._digest = hashlib.sha256()
        self._size_bytes = size_bytes
        self._advance = advance
        self._path = path
        self._free: queue.Queue[mmap.mmap] = queue.Queue()
        self._full: queue.Queue[tuple[mmap.mmap, int] | None] = queue.Queue()
        self._failure: BaseException | None = None
        for _ in range(_BLOCKS_PER_FILE):
            self._free.put(mmap.mmap(-1, BLOCK_BYTES))  # page-aligned
        self._block, self._filled = self._free.get(), 0

    def __enter__(self) -> "Output":
        self._descriptor = _open_direct(self._path)
        _reserve(self._descriptor, self._size_bytes)
        self._thread = threading.Thread(target=self._drain, name=f"writing {self._path.name}")
        self._thread.start()
        return self

    def write(self, data: memoryview) -> None:
        """Append; returns before the bytes are on the disk."""
        while data.nbytes:
            room = min(BLOCK_BYTES - self._filled, data.nbytes)
            self._block[self._filled : self._filled + room] = data[:room]
            self._filled += room
            data = data[room:]
            if self._filled == BLOCK_BYTES:
                self._hand_over()

    def finish(self) -> dict:
        """Write what is left and sync; returns {"bytes", "sha256"}."""
        self._hand_over()
        self._stop()
        os.fsync(self._descriptor)
        return {"bytes": self._size_bytes, "sha256": self._digest.hexdigest()}

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(BaseException):  # on the way out of another failure, or after finish()
            self._stop()
        os.close(self._descriptor)

    def _hand_over(self) -> None:
        self._raise_failure()
        self._full.put((self._block, self._filled))
        self._block, self._filled = self._free.get(), 0

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _drain(self) -> None:
        position = 0
        while (item := self._full.get()) is not None:
            block, filled = item
            if self._failure is None:
                try:
                    with memoryview(block)[:filled] as data:
                        self._digest.update(data)
                        _write_all(self._descriptor, data, position)
                    position += filled
                    self._advance(filled)
                except BaseException as failure:  # raised again by the thread that writes
                    self._failure = failure
            self._free.put(block)


def _open_direct(path: Path) -> int:
    """Open an existing file for writing, past the page cache where that is possible."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return os.open(path, os.O_WRONLY)


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Take the space now, so that a disk that is too small says so before the work is done."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # not every file system can
            raise


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    if len(data) % BLOCK_BYTES:
        _leave_direct(descriptor)  # the last block is of any length
    written = 0
    while written < len(data):
        try:
            written += os.pwrite(descriptor, data[written:], position + written)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                raise


def _leave_direct(descriptor: int) -> bool:
    """Go on through the page cache; False if it was so already."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


def file_blocks(path: Path, start: int, size_bytes: int) -> Iterator[memoryview]:
    """A range of a file in blocks; each is valid until the next is asked for.

    Raises:
        OSError: if the file cannot be read or ends early.
    """
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = start + size_bytes
        while start < end:
            with memoryview(buffer)[: min(BLOCK_BYTES, end - start)] as view:
                filled = 0
                while filled < len(view):
                    count = os.preadv(descriptor, [view[filled:]], start + filled)
                    if not count:
                        raise OSError(errno.EIO, "the file ends early", str(path))
                    filled += count
                yield view
            start += filled
    finally:
        os.close(descriptor)
