"""Remembered digests: a large file is not read again if its size, times and inode have not changed, as in git's index.

They are in the user's cache. Only someone who sets the clock can set the time of the last change (ctime) back.
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

# After a change this recent, the next one may get the same time (FAT's clock counts 2 s).
_SETTLED_SECONDS = 3
_WORTH_BYTES = 1 << 24  # smaller files are read again at once
_FILE = "file"  # the kind of a whole file's BLAKE3


def known_blake3(path: Path) -> str:
    """The file's BLAKE3 in hex; a large file is read again only if it has changed."""
    return remembered(path, _FILE, lambda path: {"": blake3_of(path)})[""]


def is_known(path: Path) -> bool:
    """Whether `known_blake3` needs to read no large file."""
    look = _look_of(path)
    return look["bytes"] < _WORTH_BYTES or _recorded(_record_of(path, _FILE), look) is not None


def describe_source_file(path: Path) -> dict:
    """{"bytes": size, "blake3": digest}; with "sha256" where a hub's cache names the file by it."""
    described = {"bytes": path.stat().st_size, "blake3": known_blake3(path)}
    name = path.resolve().name
    return described | {"sha256": name} if re.fullmatch("[0-9a-f]{64}", name) else described


def remembered(path: Path, kind: str, work_out: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """The result of `work_out(path)`, which reads the file. If a large file has not changed, it comes from the cache.

    Args:
        kind: a word for this kind of result.
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
        with contextlib.suppress(OSError):  # then the file is read again next time
            record.parent.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps({"look": before, "digests": digests}))
    return digests


def _record_of(path: Path, kind: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "model_preparation" / "digests"
    return cache / f"{blake3(f'{kind} {path.resolve()}'.encode()).hexdigest()}.json"


def _recorded(record: Path, look: dict[str, int]) -> dict[str, str] | None:
    """The digests of a file that looks like this; None if there is no such record."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SurgeryError):
        known = read_json(record)
        if known["look"] == look:
            return known["digests"]
    return None


def _look_of(path: Path) -> dict[str, int]:
    """Facts that show a change without reading the file."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
