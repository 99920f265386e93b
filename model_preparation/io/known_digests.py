"""Digests of files that have not changed since it was last worked out, as git's index remembers those it tracks.

In: a file, and where its record is; `remembered` has its records in the user's cache, whatever the file is used for.
Out: its digest without reading it, if size, time of change and inode are those of the record. Somebody who sets the
time back after a change can deceive this; it saves work and proves nothing.
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

# A file changed this recently may change again within what the file system's clock can tell apart (2 s on FAT).
_SETTLED_SECONDS = 3
_WORTH_BYTES = 1 << 24  # reading less takes no time of note


@dataclass(frozen=True)
class KnownFile:
    """A file's digest (in hex), and what it looked like before it was read; of tensors in it, their BLAKE3."""

    bytes: int
    digest: str
    mtime_ns: int
    inode: int
    tensors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, digest: str, tensors: dict[str, str]) -> "KnownFile":
        """The record of a file whose digests were worked out some other way, as it looks now."""
        stat = path.stat()
        return cls(stat.st_size, digest, stat.st_mtime_ns, stat.st_ino, tensors)

    def fits(self, path: Path) -> bool:
        """Whether the file still looks as it did."""
        return path.is_file() and self == KnownFile.of(path, self.digest, self.tensors)


def remembered(path: Path, kind: str, work_out: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """`work_out(path)`, which reads the file; not called again for a large file that has not changed since.

    Args:
        kind: in a word, what is worked out.
    """
    before = _look_of(path)
    if before["bytes"] < _WORTH_BYTES:
        return work_out(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model_preparation" / "digests"
    record = cache / f"{blake3(f'{kind} {path.resolve()}'.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["look"] == before:
            return known["digests"]
    digests = work_out(path)
    changed = max(before["mtime_ns"], before["ctime_ns"]) / 1e9
    if _look_of(path) == before and time.time() - changed > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # what cannot be remembered is read again
            cache.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps({"look": before, "digests": digests}))
    return digests


def _look_of(path: Path) -> dict[str, int]:
    """What tells a change without reading; unlike the other times, nobody can set `ctime` back."""
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def examine(path: Path) -> tuple[KnownFile, bool]:
    """Read the file for its BLAKE3; also whether it may be remembered: it was last changed well before it was read."""
    settled = time.time() - path.stat().st_mtime > _SETTLED_SECONDS
    before = KnownFile.of(path, "", {})
    return replace(before, digest=blake3_of(path)), settled


def recall(path: Path, record: Path) -> KnownFile | None:
    """What `record` says of `path`, or None if that says nothing or the file looks different now."""
    known = read_record(record)
    return known if known is not None and known.fits(path) else None


def read_record(record: Path) -> KnownFile | None:
    """What `remember` wrote, or None if there is nothing of the kind."""
    try:
        fields = read_json(record)
        check_fields(fields, {"bytes": int, "digest": str, "mtime_ns": int, "inode": int, "tensors": dict})
        return KnownFile(**fields)
    except (OSError, ValueError, TypeError, SurgeryError):
        return None


def remember(known: KnownFile, record: Path) -> None:
    """Write the record; it appears whole or not at all."""
    write_file(record, json.dumps(asdict(known)))
