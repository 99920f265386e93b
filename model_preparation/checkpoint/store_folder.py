"""The folder that shards of bases are kept in: its lock, and what in it can go.

In: a folder of checkpoints. Out: FOLDER/.base_shards without the shards that no checkpoint uses any more. What is in it
and how that is made, base_store.py says.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from model_preparation.errors import SurgeryError
from model_preparation.io.known_digests import read_record
from model_preparation.io.untrusted.untrusted_files import read_json, without_links

STORE = ".base_shards"

_LOCK = "lock"


@dataclass(frozen=True)
class Cleaned:
    """What `clean` removed, or would remove: files, and their size together."""

    paths: list[Path]
    size_bytes: int


def clean(checkpoints: Path, *, dry_run: bool = False) -> Cleaned:
    """Remove from the store beside checkpoints the shards that none of them uses: no file is a link to it, and no
    checkpoint lists its SHA-256. What a killed build left in the store goes too.

    Args:
        checkpoints: the folder that holds the checkpoints' folders.
        dry_run: only say what would go.

    Raises:
        SurgeryError: if there is a link in the store, or in its place.
        OSError: if the store is somebody else's.
    """
    root = without_links(checkpoints / STORE)
    if not root.is_dir():
        return Cleaned([], 0)
    with locked(root):
        used = _digests_in_use(checkpoints)
        removed = sorted(path for path in root.rglob("*.partial-*") if path.is_file())  # with the lock, nobody writes
        for path in sorted(root.glob("*/*.safetensors")):
            known = read_record(record_of(path))
            if path.stat().st_nlink == 1 and (known is None or known.digest not in used):
                removed.append(path)
        cleaned = Cleaned(removed, sum(path.stat().st_size for path in removed))
        if not dry_run:
            for path in removed:
                path.unlink()
                record_of(path).unlink(missing_ok=True)
            for folder in {path.parent for path in removed}:
                with contextlib.suppress(OSError):  # other shards are in it
                    folder.rmdir()
            if not list(root.glob("*/*.safetensors")):
                shutil.rmtree(root)
    return cleaned


def _digests_in_use(checkpoints: Path) -> set[str]:
    """The SHA-256 of every file that the checkpoints list."""
    found = set()
    for path in checkpoints.glob("*/checkpoint_info.json"):
        # A description that cannot be read protects nothing: its checkpoint has files of its own, linked or cloned.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError, SurgeryError):
            entries = read_json(path)["files"].values()
            found |= {entry["sha256"] for entry in entries}
    return found


def record_of(shard: Path) -> Path:
    """Where the digest of a stored shard is."""
    return shard.with_suffix(".json")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the store's lock, which ends with the process that holds it however that ends.

    Raises:
        SurgeryError: if there is a link in the store, or in its place.
        OSError: if the folder cannot be written to, or its file system has no locks.
    """
    lock = FileLock(root / _LOCK, fallback_to_soft=False)
    while not lock.is_locked:
        without_links(root)
        root.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # `clean` removed the store just now
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
