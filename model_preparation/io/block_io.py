"""Reads and writes files in large blocks, and bypasses the page cache (O_DIRECT) where this is possible and faster."""

import collections
import contextlib
import ctypes
import errno
import functools
import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model_preparation.io.linked_files import share_range

BLOCK_BYTES = 4 << 20  # direct I/O needs a multiple of the file system's block size
ALIGNMENT = 4096  # direct I/O and shared blocks need offsets and lengths that are multiples of this
_BLOCKS_AHEAD = 4  # blocks in memory: the caller uses one while the others are read
_BLOCKS_BEHIND = 4  # written blocks that may stay in the page cache; then the oldest must go to the disk
_RUN_BLOCKS, _TRIED_BLOCKS = 16, 128  # a trial of 512 MB: 64 MB past the page cache, 64 MB through it, and so on
_START, _FINISH = 2, 1 | 2 | 4  # flags of sync_file_range(2), linux/fs.h: begin to write; write and wait
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ESPIPE)

Advance = Callable[[int], None]  # called with the number of bytes of each block or piece
Place = tuple[Path, int]  # a file, and an offset in it in bytes


def read_into(path: Path, start: int, view: memoryview) -> None:
    """Fill `view` with a file's bytes from `start` on. They are read through the page cache.

    Raises:
        OSError: if the file cannot be read or ends early.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _read(descriptor, view, start) < len(view):
            raise OSError(errno.EIO, "the file ends early", str(path))
    finally:
        os.close(descriptor)


def read_blocks(path: Path) -> Iterator[memoryview]:
    """Yield the file's bytes in order, in blocks; a thread reads ahead. A block is valid until the next is requested.

    Raises:
        OSError: if the file cannot be read.
    """
    if path.stat().st_size <= BLOCK_BYTES:  # not worth a thread
        yield memoryview(path.read_bytes())
        return
    with contextlib.ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        if (direct := _open_direct(path, os.O_RDONLY)) is not None:
            stack.callback(os.close, direct)

        def read(buffer: mmap.mmap, position: int) -> int:
            count = 0
            with memoryview(buffer) as view:
                if direct is not None:
                    with contextlib.suppress(OSError):  # some file systems open a file for direct reads, then refuse
                        count = os.preadv(direct, [view], position)
                return count + _read(descriptor, view[count:], position + count)

        reader = stack.enter_context(ThreadPoolExecutor(1, "reading ahead"))
        buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(_BLOCKS_AHEAD)]
        reading = collections.deque(
            (buffer, reader.submit(read, buffer, number * BLOCK_BYTES)) for number, buffer in enumerate(buffers)
        )
        for number in itertools.count(_BLOCKS_AHEAD):
            buffer, ready = reading.popleft()
            if not (count := ready.result()):
                return
            yield memoryview(buffer)[:count]
            reading.append((buffer, reader.submit(read, buffer, number * BLOCK_BYTES)))


def _read(descriptor: int, view: memoryview, position: int) -> int:
    """Fill `view` with the bytes from `position` on, up to the file's end. Return how many bytes were read."""
    filled = 0
    while filled < len(view) and (count := os.preadv(descriptor, [view[filled:]], position + filled)):
        filled += count
    return filled


def _open_direct(path: Path, flags: int) -> int | None:
    """A file descriptor that bypasses the page cache; None if direct I/O is not possible."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except (OSError, AttributeError):  # this file system, or this operating system, has no direct I/O
        return None


class _Disk:
    """Finds out whether a file system writes faster with direct I/O or through the page cache, by trying both."""

    def __init__(self) -> None:
        self._tried = 0
        self._seconds = {True: 0.0, False: 0.0}  # of the trial; True: direct I/O, False: page cache

    @contextlib.contextmanager
    def next_is_direct(self, size_bytes: int) -> Iterator[bool]:
        """Yield whether to use direct I/O for the next piece. Write the piece inside the context: it is timed."""
        if self._tried >= _TRIED_BLOCKS or size_bytes < BLOCK_BYTES:
            yield self._seconds[True] <= self._seconds[False]
            return
        direct = self._tried // _RUN_BLOCKS % 2 == 0
        self._tried += 1  # two threads at once may lose a count: this does no harm
        started = time.perf_counter()
        yield direct
        self._seconds[direct] += time.perf_counter() - started


@functools.cache
def _disk(device: int) -> _Disk:
    return _Disk()


class OutputFile:
    """A new file, written in pieces in any order. The page cache holds at most a few blocks of it.

    The methods raise the file system's errors (OSError) with the file's name.
    """

    def __init__(self, path: Path, advance: Advance = lambda size_bytes: None):
        """`advance` is called for every piece written or shared."""
        self.path = path
        self._advance = advance
        self._behind: collections.deque[tuple[int, int]] = collections.deque()  # (offset, size) of cached blocks
        with _naming(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._disk = _disk(os.fstat(self._descriptor).st_dev)
            self._direct = _open_direct(path, os.O_WRONLY)

    def reserve(self, position: int, size_bytes: int) -> None:
        """Reserve disk space from `position` on. If the disk is too small, this fails before the work begins."""
        if not hasattr(os, "posix_fallocate") or not size_bytes:
            return
        with _naming(self.path):
            try:
                os.posix_fallocate(self._descriptor, position, size_bytes)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise

    def write(self, data: memoryview, position: int) -> None:
        """Write all of `data` at `position`."""
        with _naming(self.path), self._disk.next_is_direct(len(data)) as direct:
            self._write(data, position, direct=direct)
        self._advance(len(data))

    def share(self, place: Place, position: int, size_bytes: int) -> bool:
        """Let the bytes at `position` share the disk blocks at `place`. Return False if this is impossible."""
        descriptor = os.open(place[0], os.O_RDONLY)
        try:
            with _naming(self.path):
                if not share_range(descriptor, self._descriptor, place[1], size_bytes, position):
                    return False
        finally:
            os.close(descriptor)
        self._advance(size_bytes)
        return True

    def sync(self) -> None:
        with _naming(self.path):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size)  # frees space that XFS reserved
            os.fsync(self._descriptor)
            self._drop(0, 0)

    def close(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._descriptor)

    def _write(self, data: memoryview, position: int, *, direct: bool) -> None:
        descriptor = self._direct if direct and len(data) % ALIGNMENT == 0 else None  # for whole blocks only
        written = 0
        while written < len(data):
            try:
                written += os.pwrite(descriptor or self._descriptor, data[written:], position + written)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor is None:
                    raise
                descriptor = None  # some file systems open a file for direct writes, then refuse them
        if descriptor is None:
            self._write_back(position, len(data), _START)
            self._behind.append((position, len(data)))
            if len(self._behind) > _BLOCKS_BEHIND:
                oldest = self._behind.popleft()
                self._write_back(*oldest, _FINISH)
                self._drop(*oldest)

    def _write_back(self, position: int, size_bytes: int, flags: int) -> None:
        """Call sync_file_range(2), and raise its errors, because a later fsync does not report them."""
        if _sync_file_range is not None and _sync_file_range(self._descriptor, position, size_bytes, flags):
            code = ctypes.get_errno()
            if code not in _UNSUPPORTED:
                raise OSError(code, os.strerror(code))

    def _drop(self, position: int, size_bytes: int) -> None:
        """Remove synced bytes from the page cache; `size_bytes` 0 means all up to the file's end."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, position, size_bytes, os.POSIX_FADV_DONTNEED)


_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors of calls that only know the file descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
