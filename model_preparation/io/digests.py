"""Digests of files: SHA-256 of the files we write, BLAKE3 of tensors and of models we only read.

SHA-256 can be checked with common tools. BLAKE3 is four times as fast. This matters for a base, which is read whole.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from model_preparation.io.block_io import Advance, read_blocks
from model_preparation.io.untrusted.untrusted_files import regular_file

FILE_FIELDS: dict[str, type] = {"bytes": int, "sha256": str}  # what `describe_file` returns
_BLOCK_BYTES = 1 << 20

Range = tuple[int, int]  # where a tensor starts and ends in its file, in bytes


def sha256_of(path: Path, advance: Advance = lambda size_bytes: None) -> str:
    """The file's SHA-256 as 64 hex digits; `advance` is called for every block."""
    return _digest_of(path, hashlib.sha256(), advance)


def blake3_of(path: Path) -> str:
    """The file's BLAKE3 as 64 hex digits."""
    return _digest_of(path, blake3())


def describe_file(path: Path) -> dict:
    """{"bytes": size, "sha256": digest}, as our JSON files record it."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def describe_files(folder: Path, pattern: str = "**/*", excluded: Collection[str] = ()) -> dict[str, dict]:
    """{relative path: `describe_file`} of the files in `folder` that match `pattern`, sorted by path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob(pattern) if path.is_file()}
    return {name: describe_file(paths[name]) for name in sorted(paths) if name not in excluded}


def fault_of(path: Path, recorded: dict, advance: Advance = lambda size_bytes: None) -> str | None:
    """How a file differs from its recorded `describe_file`, in a few words; None if it does not differ.

    `advance` is called for every block.

    Raises:
        SurgeryError: as from `regular_file`, such as for a link that leads out of the file's folder.
    """
    if not path.is_file():
        return "missing"
    regular_file(path)
    size_bytes = path.stat().st_size
    if size_bytes != recorded["bytes"]:
        return f"{size_bytes} bytes long instead of {recorded['bytes']}"
    if sha256_of(path, advance) != recorded["sha256"]:
        return "changed (its SHA-256 differs from the recorded one)"
    return None


@dataclass
class FileDigests:
    """A file's size, its SHA-256, and the BLAKE3 of each range; digests in hex."""

    size_bytes: int = 0
    sha256: str = ""
    blake3: dict[Range, str] = field(default_factory=dict)


def read_digests(path: Path, ranges: Iterable[Range] = (), advance: Advance = lambda size_bytes: None) -> FileDigests:
    """Read a file once, from front to back, and compute all its digests.

    Args:
        path: a regular file.
        ranges: where tensors lie in it; they may overlap.
        advance: called for every block; may raise.

    Raises:
        OSError: if the file cannot be read.
    """
    sha256 = hashlib.sha256()
    waiting = sorted(set(ranges), reverse=True)
    active: list[tuple[Range, blake3]] = []
    digests = FileDigests()
    for block in read_blocks(path):
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
    digests.blake3 |= {place: blake3().hexdigest() for place in waiting if place[0] == place[1]}  # empty tensors
    return digests


def _digest_of(path: Path, digest: Any, advance: Advance = lambda size_bytes: None) -> str:
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            advance(count)
    return digest.hexdigest()
