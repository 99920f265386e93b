"""Remembered digests: a large file is not read again if its size, times and inode have not changed, as in git's index.

The digests are kept in the user's cache folder. Nobody can set the time of a file's last change (ctime) back, except by
changing the computer's clock.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import write_file
from model_preparation.io.digests import blake3_of
from model_preparation.io.untrusted.untrusted_files import read_json

# A file that changed within this time is not remembered: its next change may get the same time (FAT has steps of 2 s).
_SETTLED_SECONDS = 3
_WORTH_BYTES = 1 << 24  # smaller files are always read again
_FILE = "file"  # the kind of result in `remembered`: the BLAKE3 of a whole file


def known_blake3(path: Path) -> str:
    """The file's BLAKE3 in hex; a large file is read again only if it has changed."""
    return remembered(path, _FILE, lambda path: {"": blake3_of(path)})[""]


def is_known(path: Path) -> bool:
    """Whether `known_blake3` can answer without reading a large file."""
    look = _look_of(path)
    return look["bytes"] < _WORTH_BYTES or _recorded(_record_of(path, _FILE), look) is not None


def describe_source_file(path: Path) -> dict:
    """{"bytes": size, "blake3": digest}; also "sha256", if the file's name in a hub's cache is its SHA-256."""
    described = {"bytes": path.stat().st_size, "blake3": known_blake3(path)}
    name = path.resolve().name
    return described | {"sha256": name} if re.fullmatch("[0-9a-f]{64}", name) else described


def remembered(path: Path, kind: str, work_out: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Return `work_out(path)`, which reads the file. If a large file has not changed, return the kept result.

    Args:
        kind: a word that names this kind of result in the cache.
    """
    before = _look_of(path)
    if before["bytes"] < _WORTH_BYTES:
        return work_out(path)
    record = _record_of(path, kind)
    if (known := _recorded(record, before)) is not None:
        return known
    digests = work_out(path)
    changed = max(before["mtime_ns"], before["ctime_ns"]) / 1e9
    if _look_of(path) == before and time.time() - changed > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # without a record, the file is read again next time
            record.parent.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps({"look": before, "digests": digests}))
    return digests


def _record_of(path: Path, kind: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model_preparation" / "digests"
    return cache / f"{blake3(f'{kind} {path.resolve()}'.encode()).hexdigest()}.json"


def _recorded(record: Path, look: dict[str, int]) -> dict[str, str] | None:
    """The digests in `record`, if it was made for the same facts (`_look_of`); otherwise None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SurgeryError):
        known = read_json(record)
        if known["look"] == look:
            return known["digests"]
    return None


def _look_of(path: Path) -> dict[str, int]:
    """Facts that show whether the file has changed, without reading it."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
