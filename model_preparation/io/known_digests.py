"""Remembered digests: a file is not read again if its size, times and inode have not changed, as in git's index.

Someone who sets the time back after a change can deceive this; it saves work and proves nothing.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import write_file
from model_preparation.io.digests import blake3_of
from model_preparation.io.untrusted.untrusted_files import check_fields, read_json

# After a change this recent, the next one may get the same time (FAT's clock counts 2 s).
_SETTLED_SECONDS = 3
_WORTH_BYTES = 1 << 24  # smaller files are read again at once


@dataclass(frozen=True)
class KnownFile:
    """A file's digest in hex, its size, time and inode before it was read, and the BLAKE3 of tensors in it."""

    bytes: int
    digest: str
    mtime_ns: int
    inode: int
    tensors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, digest: str, tensors: dict[str, str]) -> "KnownFile":
        """Describe the file that is there now; its digests are given."""
        stat = path.stat()
        return cls(stat.st_size, digest, stat.st_mtime_ns, stat.st_ino, tensors)

    def fits(self, path: Path) -> bool:
        """Whether the file still has this size, time and inode."""
        return path.is_file() and self == KnownFile.of(path, self.digest, self.tensors)


def remembered(path: Path, kind: str, work_out: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """`work_out(path)`, which reads the file; for a large file that has not changed, the result in the user's cache.

    Args:
        kind: a word for what `work_out` gives.
    """
    before = _look_of(path)
    if before["bytes"] < _WORTH_BYTES:
        return work_out(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model_preparation" / "digests"
    record = cache / f"{blake3(f'{kind} {path.resolve()}'.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SurgeryError):
        known = read_json(record)
        if known["look"] == before:
            return known["digests"]
    digests = work_out(path)
    changed = max(before["mtime_ns"], before["ctime_ns"]) / 1e9
    if _look_of(path) == before and time.time() - changed > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # then it is read again next time
            cache.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps({"look": before, "digests": digests}))
    return digests


def _look_of(path: Path) -> dict[str, int]:
    """What shows a change without reading; nobody can set `ctime` back."""
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def examine(path: Path) -> tuple[KnownFile, bool]:
    """The file's record, read for its BLAKE3; and whether to remember it: its last change was well before."""
    settled = time.time() - path.stat().st_mtime > _SETTLED_SECONDS
    before = KnownFile.of(path, "", {})
    return replace(before, digest=blake3_of(path)), settled


def recall(path: Path, record: Path) -> KnownFile | None:
    """What `record` says of `path`; None if there is no record, or the file has changed."""
    known = read_record(record)
    return known if known is not None and known.fits(path) else None


def read_record(record: Path) -> KnownFile | None:
    """What `remember` wrote; None if `record` holds nothing of the kind."""
    try:
        fields = read_json(record)
        check_fields(fields, {"bytes": int, "digest": str, "mtime_ns": int, "inode": int, "tensors": dict})
        return KnownFile(**fields)
    except (OSError, ValueError, TypeError, SurgeryError):
        return None


def remember(known: KnownFile, record: Path) -> None:
    """Write the record; it appears whole or not at all."""
    write_file(record, json.dumps(asdict(known)))
