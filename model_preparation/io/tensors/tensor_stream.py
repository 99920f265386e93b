"""Tensors' bytes appended to files: every source block is read once, and is hashed and written by other threads."""

import collections
import contextlib
import errno
import hashlib
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from blake3 import blake3
from zlib_ng.zlib_ng import crc32

from model_preparation.io import block_io
from model_preparation.io.block_io import ALIGNMENT, Advance, OutputFile, Place

_BUFFERS = 4  # one being filled, some being hashed, some being written; 8 are 16 MB more and hardly faster

# Page-aligned blocks of memory in rotation, and who still uses each.
Buffers = collections.deque[tuple[mmap.mmap, list[Future]]]


class TensorSource(Protocol):
    """Where a tensor's bytes, in C order, come from; `place` if they lie in a file unchanged."""

    @property
    def place(self) -> Place | None: ...

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the tensor's bytes from `start` on."""


@contextlib.contextmanager
def streaming(paths: Sequence[Path], size_bytes: int, advance: Advance) -> Iterator["Stream"]:
    """A stream to new files, of at least `size_bytes` each; `advance` is called for every piece, and may raise."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(contextlib.closing(OutputFile(path, advance))) for path in paths]
        writers = stack.enter_context(ThreadPoolExecutor(len(files) + 1, "writing"))
        blocks = (mmap.mmap(-1, block_io.BLOCK_BYTES) for _ in range(_BUFFERS))
        stream = Stream(files, writers, Buffers((block, []) for block in blocks))
        stream.reserve(size_bytes)
        yield stream


def _wait_for(futures: Sequence[Future]) -> None:
    """Wait until all are done; raises what the first failed one raised."""
    for future in futures:
        future.result()


class Stream:
    """Bytes appended to several files that begin alike. The files share them on the disk where the file system can.

    The methods raise the file system's errors (OSError), perhaps a few calls late.
    """

    def __init__(self, files: Sequence[OutputFile], writers: ThreadPoolExecutor, buffers: Buffers):
        self.files = files
        self.position = 0
        self._writers = writers
        self._buffers = buffers
        self._hasher = ThreadPoolExecutor(1, "hashing")
        self._digest = hashlib.sha256()
        self._tail = bytearray()  # bytes that do not fill a multiple of ALIGNMENT yet
        self._pending: list[Future] = []
        self._written = list(files[:1] if _can_share(files) else files)  # the others share it in `split`

    def reserve(self, size_bytes: int) -> None:
        """Take the space of the next `size_bytes` now; at least as many must follow."""
        if len(self._written) == len(self.files):  # else it may be shared later: Btrfs would keep both
            for file in self.files:
                file.reserve(self.position, size_bytes)

    def append(self, data: bytes | bytearray) -> None:
        """Add a few bytes."""
        copy = bytes(data)
        self._pending.append(self._hasher.submit(self._digest.update, copy))
        self._add_to_tail(copy)

    def copy(self, source: TensorSource, size_bytes: int) -> tuple[int, str]:
        """Add a tensor; returns its CRC-32, and its BLAKE3 in hex.

        Bytes that its file can share with the stream's files are read only for the digests.
        """
        shared = source.place is not None and self._share(source.place, size_bytes)
        crc, digest = 0, blake3()
        for start in range(0, size_bytes, block_io.BLOCK_BYTES):
            buffer, users = self._buffers.popleft()
            _wait_for(users)
            view = memoryview(buffer)[: size_bytes - start]
            source.read_into(view, start)
            users = [self._hasher.submit(self._digest.update, view)]
            whole_bytes = 0 if self._tail else len(view) - len(view) % ALIGNMENT
            if whole_bytes:
                users += [] if shared else self._write(view[:whole_bytes])
                self.position += whole_bytes
            self._add_to_tail(view[whole_bytes:])
            self._pending += users
            self._buffers.append((buffer, users))
            crc = crc32(view, crc)
            digest.update(view)
        return crc, digest.hexdigest()

    def _share(self, place: Place, size_bytes: int) -> bool:
        """Share the whole blocks of the next `size_bytes` with `place`; False where that is impossible."""
        whole_bytes = size_bytes - size_bytes % ALIGNMENT
        if self._tail or not whole_bytes or place[1] % ALIGNMENT:
            return False
        return all(file.share(place, self.position, whole_bytes) for file in self._written)

    def split(self) -> list["Stream"]:
        """One stream per file, each with this beginning."""
        self._drain()
        for file in self.files:
            beginning = (self._written[0].path, 0)
            if file not in self._written and self.position and not file.share(beginning, 0, self.position):
                raise OSError(errno.EIO, "The file system shares a block, but not many", str(file.path))
        streams = []
        for file in self.files:
            stream = Stream([file], self._writers, self._buffers)
            stream.position, stream._tail, stream._digest = self.position, self._tail.copy(), self._digest.copy()
            streams.append(stream)
        return streams

    def finish(self) -> dict:
        """Write the remaining bytes and sync; returns {"bytes", "sha256"}."""
        self._write_tail(len(self._tail))
        self._drain()
        for file in self.files:
            file.sync()
        return {"bytes": self.position, "sha256": self._digest.hexdigest()}

    def _add_to_tail(self, data: bytes | memoryview) -> None:
        self._tail += data
        whole_bytes = len(self._tail) - len(self._tail) % ALIGNMENT
        if whole_bytes == len(self._tail) or whole_bytes >= block_io.BLOCK_BYTES:
            self._write_tail(whole_bytes)

    def _write_tail(self, size_bytes: int) -> None:
        if size_bytes:
            block = mmap.mmap(-1, size_bytes)  # direct I/O wants aligned memory
            block[:] = bytes(self._tail[:size_bytes])
            self._pending += self._write(memoryview(block))
            self.position += size_bytes
            del self._tail[:size_bytes]

    def _write(self, view: memoryview) -> list[Future]:
        return [self._writers.submit(file.write, view, self.position) for file in self._written]

    def _drain(self) -> None:
        self._hasher.shutdown()
        _wait_for(self._pending)


def _can_share(files: Sequence[OutputFile]) -> bool:
    """Try with their first block whether these new files can share extents."""
    if len(files) < 2:
        return False
    block = mmap.mmap(-1, ALIGNMENT)
    files[0].write(memoryview(block), 0)
    return all(file.share((files[0].path, 0), 0, ALIGNMENT) for file in files[1:])
