"""A file read once, from front to back, for its SHA-256 and the BLAKE3 of the tensors in it.

In: a path and the ranges that tensors have in it. Out: the digests. The disk is read past the page cache where that is
possible, by a thread that stays ahead of the hashing: a few blocks are in memory, whatever the file's size.
"""

import fcntl
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

_BLOCK_BYTES = 4 << 20  # a multiple of every file system's block, as direct I/O asks for
_BLOCKS = 4  # one being hashed, the others read ahead

Range = tuple[int, int]  # where a tensor starts and ends in its file, in bytes


@dataclass
class FileDigests:
    """What a file holds: its size, its SHA-256, and the BLAKE3 of each range, all in hex."""

    size_bytes: int = 0
    sha256: str = ""
    blake3: dict[Range, str] = field(default_factory=dict)


def read_digests(
    path: Path,
    ranges: Iterable[Range] = (),
    advance: Callable[[int], None] = lambda size_bytes: None,
    stop: threading.Event | None = None,
) -> FileDigests:
    """Read a file once and work out its digests.

    Args:
        path: a regular file.
        ranges: those of tensors; they may overlap.
        advance: told the bytes of every block hashed.
        stop: set by another thread to end early; what comes back is worth nothing then.

    Raises:
        OSError: if the file cannot be read.
    """
    sha256 = hashlib.sha256()
    waiting = sorted(set(ranges), reverse=True)
    active: list[tuple[Range, blake3]] = []
    digests = FileDigests()
    for block in _blocks(path):
        if stop is not None and stop.is_set():
            break
        start, end = digests.size_bytes, digests.size_bytes + len(block)
        sha256.update(block)
        while waiting and waiting[-1][0] < end:
            active.append((waiting.pop(), blake3()))
        for (first, last), digest in active:
            digest.update(block[max(first - start, 0) : max(last - start, 0)])
        digests.blake3 |= {place: digest.hexdigest() for place, digest in active if place[1] <= end}
        active = [(place, digest) for place, digest in active if place[1] > end]
        digests.size_bytes = end
        advance(len(block))
    digests.sha256 = sha256.hexdigest()
    digests.blake3 |= {place: blake3().hexdigest() for place in waiting if place[0] == place[1]}  # of empty tensors
    return digests


def _blocks(path: Path) -> Iterator[memoryview]:
    """The file's bytes in order; each block is valid until the next is asked for."""
    if path.stat().st_size <= _BLOCK_BYTES:  # not worth a thread
        yield memoryview(path.read_bytes())
        return
    descriptor = _open(path)
    try:
        yield from _ReadAhead(descriptor)
    finally:
        os.close(descriptor)


class _ReadAhead:
    """The blocks of an open file, read by a thread of its own while the one before is worked on."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._free: queue.Queue[mmap.mmap | None] = queue.Queue()
        self._full: queue.Queue[tuple[mmap.mmap, int] | BaseException] = queue.Queue()
        for _ in range(_BLOCKS):
            self._free.put(mmap.mmap(-1, _BLOCK_BYTES))

    def __iter__(self) -> Iterator[memoryview]:
        thread = threading.Thread(target=self._run, name="reading ahead")
        thread.start()
        try:
            while True:
                item = self._full.get()
                if isinstance(item, BaseException):
                    raise item
                buffer, count = item
                if not count:
                    return
                yield memoryview(buffer)[:count]
                self._free.put(buffer)
        finally:
            self._free.put(None)
            thread.join()

    def _run(self) -> None:
        position = 0
        try:
            while (buffer := self._free.get()) is not None:
                count = _read(self._descriptor, buffer, position)
                self._full.put((buffer, count))
                if not count:
                    return
                position += count
        except BaseException as failure:  # raised again by the thread that hashes
            self._full.put(failure)


def _open(path: Path) -> int:
    """Open for reading, past the page cache where that is possible."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return os.open(path, os.O_RDONLY)


def _read(descriptor: int, buffer: mmap.mmap, position: int) -> int:
    """Fill the buffer from `position` on, or to the file's end; returns how many bytes that is."""
    filled = 0
    with memoryview(buffer) as view:
        while filled < len(view):
            direct = getattr(os, "O_DIRECT", 0)
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if flags & direct and (position + filled) % mmap.PAGESIZE:  # behind the end of the last whole block
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
            try:
                count = os.preadv(descriptor, [view[filled:]], position + filled)
            except OSError:
                if not flags & direct:
                    raise
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)  # a file system that promised too much
                continue
            if not count:
                break
            filled += count
    return filled
