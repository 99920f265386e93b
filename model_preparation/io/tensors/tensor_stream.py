"""Appends tensors' bytes to files. Every source block is read once; other threads compute its SHA-256 and write it."""

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

_BUFFERS = 4  # some are filled, hashed or written at the same time; 8 take 16 MB more and are hardly faster

# Page-aligned blocks of memory, used in turn, each with the tasks that may still use it.
Buffers = collections.deque[tuple[mmap.mmap, list[Future]]]


class TensorSource(Protocol):
    """The source of a tensor's bytes, in C order. `place` is None if no file holds exactly these bytes."""

    @property
    def place(self) -> Place | None: ...

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the tensor's bytes from `start` on."""


@contextlib.contextmanager
def streaming(paths: Sequence[Path], size_bytes: int, advance: Advance) -> Iterator["Stream"]:
    """Yield a stream to new files of at least `size_bytes` each; `advance` is called for every piece, and may raise."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(contextlib.closing(OutputFile(path, advance))) for path in paths]
        writers = stack.enter_context(ThreadPoolExecutor(len(files) + 1, "writing"))
        blocks = (mmap.mmap(-1, block_io.BLOCK_BYTES) for _ in range(_BUFFERS))
        stream = Stream(files, writers, Buffers((block, []) for block in blocks))
        stream.reserve(size_bytes)
        yield stream


def _wait_for(futures: Sequence[Future]) -> None:
    """Wait for the futures in order. If one failed, raise its exception without waiting for the rest."""
    for future in futures:
        future.result()


class Stream:
    """Appends the same bytes to several files. The files share disk blocks if the file system can do this.

    The methods raise the file system's errors (OSError), perhaps a few calls late.
    """

    def __init__(self, files: Sequence[OutputFile], writers: ThreadPoolExecutor, buffers: Buffers):
        self.files = files
        self.position = 0
        self._writers = writers
        self._buffers = buffers
        self._hasher = ThreadPoolExecutor(1, "hashing")
        self._digest = hashlib.sha256()
        self._tail = bytearray()  # bytes not yet written, because writes need multiples of ALIGNMENT
        self._pending: list[Future] = []
        self._written = list(files[:1] if _can_share(files) else files)  # the others get the bytes in `split`

    def reserve(self, size_bytes: int) -> None:
        """Reserve disk space for the next `size_bytes`. At least as many bytes must follow."""
        if len(self._written) == len(self.files):  # not if blocks will be shared: Btrfs would keep the space
            for file in self.files:
                file.reserve(self.position, size_bytes)

    def append(self, data: bytes | bytearray) -> None:
        """Append a few bytes."""
        copy = bytes(data)
        self._pending.append(self._hasher.submit(self._digest.update, copy))
        self._add_to_tail(copy)

    def copy(self, source: TensorSource, size_bytes: int) -> tuple[int, str]:
        """Append a tensor; returns its CRC-32, and its BLAKE3 in hex.

        If the stream's files can share disk blocks with the source's file, the bytes are read only for the digests.
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
        """Share the whole blocks of the next `size_bytes` with `place`; returns False if this is impossible."""
        whole_bytes = size_bytes - size_bytes % ALIGNMENT
        if self._tail or not whole_bytes or place[1] % ALIGNMENT:
            return False
        return all(file.share(place, self.position, whole_bytes) for file in self._written)

    def split(self) -> list["Stream"]:
        """Return one stream per file. Each stream appends to what its file has so far."""
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
        """Write the remaining bytes and sync; returns {"bytes": size, "sha256": digest}."""
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
            block = mmap.mmap(-1, size_bytes)  # direct I/O needs aligned memory
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
    """Whether these new files can share blocks on the disk. Their first blocks are written to find out."""
    if len(files) < 2:
        return False
    block = mmap.mmap(-1, ALIGNMENT)
    files[0].write(memoryview(block), 0)
    return all(file.share((files[0].path, 0), 0, ALIGNMENT) for file in files[1:])
