"""Files in large blocks: read through the page cache, written past it where the file system allows.

In: ranges of files, or bytes. Out: a `Stream`: bytes that go front to back into one or several files and are hashed
once, by threads of their own while the next block is read.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4 << 20  # a multiple of every file system's block, as direct I/O asks for
ALIGNMENT = 4096  # of places and lengths, for direct I/O and for sharing extents
_BUFFERS = 4  # one being filled, some being hashed, some being written; 8 are 16 MB more and hardly faster
_FICLONERANGE = 0x4020940D  # linux/fs.h
_CANNOT_SHARE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL)

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


class OutputFile:
    """A new file of known size, written in pieces in any order, its blocks past the page cache where possible.

    What the methods raise are the file system's errors (OSError), naming the file.
    """

    def __init__(self, path: Path, size_bytes: int, advance: Advance = lambda size_bytes: None):
        """`advance` is told the bytes of every piece written or shared."""
        self.path = path
        self.size_bytes = size_bytes
        self._advance = advance
        with _naming(path):
            self._descriptor = _create(path)

    def reserve(self) -> None:
        """Take the space now, so that a disk that is too small says so before the work is done."""
        if not hasattr(os, "posix_fallocate"):
            return
        with _naming(self.path):
            try:
                os.posix_fallocate(self._descriptor, 0, self.size_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # not every file system can
                    raise

    def write(self, data: memoryview, position: int) -> None:
        """Write all of `data` at `position`."""
        if len(data) % ALIGNMENT:
            self._leave_direct()  # the end of the file is of any length
        written = 0
        with _naming(self.path):
            while written < len(data):
                try:
                    written += os.pwrite(self._descriptor, data[written:], position + written)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._leave_direct():
                        raise
        self._advance(written)

    def share(self, place: Place, position: int, size_bytes: int) -> bool:
        """Let whole blocks at `position` be another file's, on the disk too; False where that cannot be done.

        Source: ioctl_ficlonerange(2); XFS and Btrfs can, within one file system.
        """
        descriptor = os.open(place[0], os.O_RDONLY)
        wish = struct.pack("qQQQ", descriptor, place[1], size_bytes, position)
        try:
            fcntl.ioctl(self._descriptor, _FICLONERANGE, wish)
        except OSError as error:
            if error.errno in _CANNOT_SHARE:
                return False
            error.filename = str(self.path)
            raise
        finally:
            os.close(descriptor)
        self._advance(size_bytes)
        return True

    def sync(self) -> None:
        with _naming(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _leave_direct(self) -> bool:
        """Go on through the page cache; False if it was so already."""
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~direct)
        return bool(flags & direct)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls on a descriptor do not say what file it is."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except (OSError, AttributeError):  # a file system or a system without
        return os.open(path, flags, 0o666)


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

    def reserve(self) -> None:
        """Take the files' space now, unless it may turn out to be another file's: Btrfs would keep both."""
        if len(self._written) == len(self.files):
            for file in self.files:
                file.reserve()

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
