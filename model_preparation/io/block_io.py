"""Files in large blocks: read through the page cache; written past it or through it, whichever the disk does faster.

In: ranges of files, or bytes. Out: a `Stream`: bytes that go front to back into one or several files and are hashed
once, by threads of their own while the next block is read.
"""

import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4 << 20  # a multiple of every file system's block, as direct I/O asks for
ALIGNMENT = 4096  # of places and lengths, for direct I/O and for sharing extents
_BUFFERS = 4  # one being filled, some being hashed, some being written; 8 are 16 MB more and hardly faster
_BLOCKS_BEHIND = 4  # of a file, that may be in the page cache and not on the disk yet
_RUN_BLOCKS, _TRIED_BLOCKS = 16, 128  # the first 512 MB go both ways by turns, 64 MB each time
_FICLONERANGE = 0x4020940D  # linux/fs.h
_START, _FINISH = 2, 1 | 2 | 4  # SYNC_FILE_RANGE_..., linux/fs.h
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ESPIPE)

Advance = Callable[[int], None]
Place = tuple[Path, int]  # a file, and where in it, in bytes


class Buffers:
    """Page-aligned blocks of memory in rotation: each is handed out again when all that used it are done."""

    def __init__(self) -> None:
        self._ready: collections.deque[tuple[mmap.mmap, list[Future]]] = collections.deque(
            (mmap.mmap(-1, BLOCK_BYTES), []) for _ in range(_BUFFERS)
        )

    @contextlib.contextmanager
    def take(self, size_bytes: int) -> Iterator[tuple[memoryview, list[Future]]]:
        """A view of `size_bytes`, and a list for the futures of those who use it beyond this block.

        Raises:
            BaseException: what an earlier user of the same memory failed with.
        """
        buffer, users = self._ready.popleft()
        wait_for(users)
        users = []
        yield memoryview(buffer)[:size_bytes], users
        self._ready.append((buffer, users))


def wait_for(futures: Sequence[Future]) -> None:
    """Wait until all are done; raises what the first failed one raised."""
    for future in futures:
        future.result()


def read_into(path: Path, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a file from `start` on.

    Raises:
        OSError: if the file cannot be read or ends early.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        filled = 0
        while filled < len(view):
            count = os.preadv(descriptor, [view[filled:]], start + filled)
            if not count:
                raise OSError(errno.EIO, "the file ends early", str(path))
            filled += count
    finally:
        os.close(descriptor)


class _Disk:
    """Which way a file system takes blocks faster: past its page cache or through it. The first ones go both ways."""

    def __init__(self) -> None:
        self._tried = 0
        self._seconds = {True: 0.0, False: 0.0}  # that the blocks tried took directly, and through the cache

    @contextlib.contextmanager
    def next_is_direct(self, size_bytes: int) -> Iterator[bool]:
        """How to write the next piece, which is written inside the context."""
        if self._tried >= _TRIED_BLOCKS:
            yield self._seconds[True] <= self._seconds[False]
            return
        if size_bytes < BLOCK_BYTES:
            yield True
            return
        direct = self._tried // _RUN_BLOCKS % 2 == 0
        self._tried += 1  # two threads may count one block: no matter
        started = time.perf_counter()
        yield direct
        self._seconds[direct] += time.perf_counter() - started


@functools.cache
def _disk(device: int) -> _Disk:
    return _Disk()


class OutputFile:
    """A new file, written in pieces in any order, of which the page cache holds a few blocks at most.

    What the methods raise are the file system's errors (OSError), naming the file.
    """

    def __init__(self, path: Path, advance: Advance = lambda size_bytes: None):
        """`advance` is told the bytes of every piece written or shared."""
        self.path = path
        self._advance = advance
        self._behind: collections.deque[tuple[int, int]] = collections.deque()  # (place, bytes) in the page cache
        with _naming(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._disk = _disk(os.fstat(self._descriptor).st_dev)
            try:
                self._direct: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except (OSError, AttributeError):  # a file system or a system without
                self._direct = None

    def reserve(self, position: int, size_bytes: int) -> None:
        """Take the space from `position` on now, so that a disk that is too small says so before the work is done."""
        if not hasattr(os, "posix_fallocate") or not size_bytes:
            return
        with _naming(self.path):
            try:
                os.posix_fallocate(self._descriptor, position, size_bytes)
            except OSError as error:
                if error.errno not in _CANNOT:  # not every file system can
                    raise

    def write(self, data: memoryview, position: int) -> None:
        """Write all of `data` at `position`."""
        with _naming(self.path), self._disk.next_is_direct(len(data)) as direct:
            self._write(data, position, direct=direct)
        self._advance(len(data))

    def share(self, place: Place, position: int, size_bytes: int) -> bool:
        """Let whole blocks at `position` be another file's, on the disk too; False where that cannot be done.

        Source: ioctl_ficlonerange(2); XFS and Btrfs can, within one file system.
        """
        descriptor = os.open(place[0], os.O_RDONLY)
        wish = struct.pack("qQQQ", descriptor, place[1], size_bytes, position)
        try:
            fcntl.ioctl(self._descriptor, _FICLONERANGE, wish)
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            error.filename = str(self.path)
            raise
        finally:
            os.close(descriptor)
        self._advance(size_bytes)
        return True

    def sync(self) -> None:
        with _naming(self.path):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size)  # XFS has taken room for more
            os.fsync(self._descriptor)
            self._drop(0, 0)

    def close(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._descriptor)

    def _write(self, data: memoryview, position: int, *, direct: bool) -> None:
        descriptor = self._direct if direct and len(data) % ALIGNMENT == 0 else None  # a file's end is of any length
        written = 0
        while written < len(data):
            try:
                written += os.pwrite(descriptor or self._descriptor, data[written:], position + written)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor is None:
                    raise
                descriptor = None  # a file system that opens files for direct writes, and refuses them
        if descriptor is None:
            self._write_back(position, len(data), _START)
            self._behind.append((position, len(data)))
            if len(self._behind) > _BLOCKS_BEHIND:
                oldest = self._behind.popleft()
                self._write_back(*oldest, _FINISH)
                self._drop(*oldest)

    def _write_back(self, position: int, size_bytes: int, flags: int) -> None:
        """Source: sync_file_range(2); an error told by it is not told by fsync any more."""
        if _sync_file_range is not None and _sync_file_range(self._descriptor, position, size_bytes, flags):
            code = ctypes.get_errno()
            if code not in _CANNOT:
                raise OSError(code, os.strerror(code))

    def _drop(self, position: int, size_bytes: int) -> None:
        """Have the page cache let go of what is on the disk; 0 bytes are all."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, position, size_bytes, os.POSIX_FADV_DONTNEED)


_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls on a descriptor do not say what file it is."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class Stream:
    """Bytes appended to several files at once, which begin alike.

    Where the file system can, the files share what they have in common on the disk. What the methods raise are the
    file system's errors (OSError), perhaps a few calls late.
    """

    def __init__(self, files: Sequence[OutputFile], writers: ThreadPoolExecutor):
        self.files = files
        self.position = 0
        self._writers = writers
        self._hasher = ThreadPoolExecutor(1, "hashing")
        self._digest = hashlib.sha256()
        self._tail = bytearray()  # what does not fill a multiple of ALIGNMENT yet
        self._pending: list[Future] = []
        self._written = list(files[:1] if _can_share(files) else files)  # the others get their part in `split`

    def reserve(self, size_bytes: int) -> None:
        """Take the space of what comes next now; at least `size_bytes` must come."""
        if len(self._written) == len(self.files):  # else it may turn out to be another file's: Btrfs would keep both
            for file in self.files:
                file.reserve(self.position, size_bytes)

    def append(self, data: bytes | bytearray) -> None:
        """Add a few bytes."""
        copy = bytes(data)
        self._pending.append(self._hasher.submit(self._digest.update, copy))
        self._add_to_tail(copy)

    def append_block(self, view: memoryview, *, shared: bool = False) -> list[Future]:
        """Add page-aligned memory, which must stay as it is until the futures returned are done.

        Args:
            shared: its whole blocks are in the files already, by `share`.
        """
        users = [self._hasher.submit(self._digest.update, view)]
        whole_bytes = 0 if self._tail else len(view) - len(view) % ALIGNMENT
        if whole_bytes:
            users += [] if shared else self._write(view[:whole_bytes])
            self.position += whole_bytes
        self._add_to_tail(view[whole_bytes:])
        self._pending += users
        return users

    def share(self, place: Place, size_bytes: int) -> bool:
        """Let the whole blocks of the next `size_bytes` be those at `place`; False where that cannot be done."""
        whole_bytes = size_bytes - size_bytes % ALIGNMENT
        if self._tail or not whole_bytes or place[1] % ALIGNMENT:
            return False
        return all(file.share(place, self.position, whole_bytes) for file in self._written)

    def split(self) -> list["Stream"]:
        """One stream per file, to go on differently."""
        self._drain()
        for file in self.files:
            beginning = (self._written[0].path, 0)
            if file not in self._written and self.position and not file.share(beginning, 0, self.position):
                raise OSError(errno.EIO, "The file system shares a block, but not many", str(file.path))
        streams = []
        for file in self.files:
            stream = Stream([file], self._writers)
            stream.position, stream._tail, stream._digest = self.position, self._tail.copy(), self._digest.copy()
            streams.append(stream)
        return streams

    def finish(self) -> dict:
        """Write what is left and sync; returns {"bytes", "sha256"}."""
        self._write_tail(len(self._tail))
        self._drain()
        for file in self.files:
            file.sync()
        return {"bytes": self.position, "sha256": self._digest.hexdigest()}

    def _add_to_tail(self, data: bytes | memoryview) -> None:
        self._tail += data
        whole_bytes = len(self._tail) - len(self._tail) % ALIGNMENT
        if whole_bytes == len(self._tail) or whole_bytes >= BLOCK_BYTES:
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
        wait_for(self._pending)


def _can_share(files: Sequence[OutputFile]) -> bool:
    """Whether these new files can share extents: found out with their first block."""
    if len(files) < 2:
        return False
    block = mmap.mmap(-1, ALIGNMENT)
    files[0].write(memoryview(block), 0)
    return all(file.share((files[0].path, 0), 0, ALIGNMENT) for file in files[1:])
