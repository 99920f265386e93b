"""Digests of files that have not changed since it was last worked out, as git's index remembers those it tracks.

In: a file, and where its record is. Out: its digest without reading it, if size, time of change and inode are those of
the record. Somebody who sets the time back after a change can deceive this; it saves work and proves nothing.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from model_preparation.errors import SurgeryError
from model_preparation.files.digests import blake3_of
from model_preparation.files.new_file import write_file
from model_preparation.untrusted.untrusted_files import check_fields, read_json

# A file changed this recently may change again within what the file system's clock can tell apart (2 s on FAT).
_SETTLED_SECONDS = 3


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
