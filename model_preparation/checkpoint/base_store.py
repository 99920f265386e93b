"""A store of a base's shards, next to its checkpoints. So layers without a graft are on the disk only once.

FOLDER/.base_shards/DIGEST/ has a safetensors file for each layer of the base that a checkpoint needed, and for its
embedding and head. The checkpoints have reflinks or hard links to these files. DIGEST depends on the base's files
and on the dtype. A store can be deleted at any time; no checkpoint needs it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from model_preparation.errors import SurgeryError
from model_preparation.io.block_io import Advance
from model_preparation.io.complete_file import write_file
from model_preparation.io.complete_folder import remove_abandoned
from model_preparation.io.linked_files import can_share, share_file
from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.safetensors_writer import Shard
from model_preparation.io.untrusted.untrusted_files import check_fields, read_json, without_links

STORE = ".base_shards"

_LOCK = "lock"
_LAYOUT = 1  # version of a shard's layout: add one when names, order or header change
_NO_STORE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class StoredShard:
    """A shard's record: its SHA-256 (`digest`), its tensors' BLAKE3, and its size, time and inode after writing.

    The record saves reading the shard again. It proves nothing: someone can change the shard and set its time back.
    """

    bytes: int
    digest: str
    mtime_ns: int
    inode: int
    tensors: dict[str, str]

    @classmethod
    def of(cls, path: Path, digest: str, tensors: dict[str, str]) -> "StoredShard":
        """Describe the file at `path`: its present size, time and inode, and the given digests."""
        stat = path.stat()
        return cls(stat.st_size, digest, stat.st_mtime_ns, stat.st_ino, tensors)

    @classmethod
    def recorded(cls, path: Path) -> "StoredShard | None":
        """The record of a shard, even if the shard has changed since; None if there is no valid record."""
        try:
            fields = read_json(record_of(path))
            check_fields(fields, {"bytes": int, "digest": str, "mtime_ns": int, "inode": int, "tensors": dict})
            return cls(**fields)
        except (OSError, ValueError, TypeError, SurgeryError):
            return None


class BaseStore:
    """The shards of one base in one dtype.

    Args:
        checkpoints: the folder that holds the checkpoints' folders.
        base_files: {"blake3"} of every file that determines the base (config, weights, their index), by name.
        dtype: the dtype of the shards' tensors.
    """

    def __init__(self, checkpoints: Path, base_files: Mapping[str, dict], dtype: DType):
        self._root = checkpoints / STORE
        digests = {name: described["blake3"] for name, described in base_files.items()}
        identity = {"layout": _LAYOUT, "dtype": str(dtype), "files": digests}
        self._folder = self._root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """The `shards` that are not stored yet."""
        return [shard for shard in shards if self._stored(shard) is None]

    def provide(self, shard: Shard, target: Path, advance: Advance) -> tuple[dict, dict[str, str]]:
        """Make the file `target` from the store. A missing shard is written into the store first.

        If nothing can be shared (no links, no locks, or another user's store), `target` is simply written.

        Returns:
            The values of `Shard.write`.

        Raises:
            OSError: from the file system: disk full, input/output error.
        """
        if not self._usable:
            return shard.write(target, advance)
        path = self._folder / shard.file
        with locked(self._root):  # a second build on the same base waits here, and then finds the shard
            known = self._stored(shard)
            if known is None:
                known = self._make(shard, advance)
            else:
                advance(known.bytes)
            share_file(path, target)
        return {"bytes": known.bytes, "sha256": known.digest}, known.tensors

    @cached_property
    def _usable(self) -> bool:
        """Whether files in the store can be shared."""
        try:
            with locked(self._root):
                return can_share(self._root)
        except OSError as error:
            if error.errno in _NO_STORE:
                return False
            raise

    def _stored(self, shard: Shard) -> StoredShard | None:
        """The stored shard, or None if it is missing or changed.

        The header is checked too, because a stranger may have made both the shard and its record.
        """
        path = self._folder / shard.file
        known = StoredShard.recorded(path)
        if known is None or not path.is_file() or known != StoredShard.of(path, known.digest, known.tensors):
            return None
        with path.open("rb") as file:
            fits = known.bytes == shard.size_bytes and file.read(len(shard.header)) == shard.header
        return known if fits else None

    def _make(self, shard: Shard, advance: Advance) -> StoredShard:
        """Write the shard into the store, read-only, because checkpoints may have hard links to it."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / shard.file
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            described, tensors = shard.write(partial, advance)
            partial.chmod(partial.stat().st_mode & 0o444)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        known = StoredShard.of(path, described["sha256"], tensors)
        write_file(record_of(path), json.dumps(asdict(known)))
        return known


@dataclass(frozen=True)
class Cleaned:
    """The folders and files that `clean_checkpoints` removed, or would remove.

    Attributes:
        abandoned: folders of killed builds.
        paths: files in the store.
        size_bytes: the total size of `paths`.
    """

    abandoned: list[Path]
    paths: list[Path]
    size_bytes: int


def clean_checkpoints(checkpoints: str | Path, *, dry_run: bool = False) -> Cleaned:
    """Remove leftovers that no checkpoint needs: NAME.partial of killed builds, and unused shards of bases.

    A shard is unused if no file is a link to it and no checkpoint lists its SHA-256. Folders and files of a running
    build stay.

    Args:
        checkpoints: the folder that holds the checkpoints' folders.
        dry_run: remove nothing, only list it.

    Raises:
        SurgeryError: if the folder does not exist, or the store is a link or contains one.
        OSError: if the store belongs to another user.
    """
    folder = Path(checkpoints).expanduser()
    if not folder.is_dir():
        raise SurgeryError(f"{folder} is no folder. With --dir, give the folder that holds the checkpoints' folders.")
    abandoned = remove_abandoned(folder, dry_run=dry_run)
    root = without_links(folder / STORE)
    if not root.is_dir():
        return Cleaned(abandoned, [], 0)
    with locked(root):
        used = _digests_in_use(folder)
        removed = sorted(path for path in root.rglob("*.partial-*") if path.is_file())  # of killed builds
        for path in sorted(root.glob("*/*.safetensors")):
            known = StoredShard.recorded(path)
            if path.stat().st_nlink == 1 and (known is None or known.digest not in used):
                removed.append(path)
        cleaned = Cleaned(abandoned, removed, sum(path.stat().st_size for path in removed))
        if not dry_run:
            for path in removed:
                path.unlink()
                record_of(path).unlink(missing_ok=True)
            for shards in {path.parent for path in removed}:
                with contextlib.suppress(OSError):  # the folder still has other shards
                    shards.rmdir()
            if not list(root.glob("*/*.safetensors")):
                shutil.rmtree(root)
    return cleaned


def _digests_in_use(checkpoints: Path) -> set[str]:
    """The SHA-256 of every file that the checkpoints list."""
    found = set()
    for path in checkpoints.glob("*/checkpoint_info.json"):
        # An unreadable file protects no shard. Its checkpoint loses nothing, because links and clones stay.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError, SurgeryError):
            found |= {entry["sha256"] for entry in read_json(path)["files"].values()}
    return found


def record_of(shard: Path) -> Path:
    """The file with the record of a stored shard."""
    return shard.with_suffix(".json")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the store's lock. A killed process releases the lock.

    Raises:
        SurgeryError: if the store is a link or contains one.
        OSError: if the folder is not writable, or its file system has no locks.
    """
    lock = FileLock(root / _LOCK, fallback_to_soft=False)
    while not lock.is_locked:
        without_links(root)
        root.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # `clean_checkpoints` removed the store just now
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
