"""Shards of a base, kept beside the checkpoints made from it, so that its untouched layers are on the disk once.

In: the base's files, and a folder of checkpoints. Out: FOLDER/.base_shards/DIGEST/ with one safetensors file per layer
of the base that some checkpoint needed, and in each checkpoint a reflink or hard link of it. DIGEST is of the BLAKE3
of all the base's files and of the dtype, so another base, or the same one changed, has another folder. A base that has
not changed is not read again to learn that: see known_digests.py. A store can be deleted at any time; no checkpoint
needs it.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from model_preparation.checkpoint.store_folder import STORE, locked, record_of
from model_preparation.io.block_io import Advance
from model_preparation.io.digests import describe_source_file
from model_preparation.io.known_digests import KnownFile, examine, recall, remember
from model_preparation.io.progress import bar
from model_preparation.io.shared_files import can_share, share_file
from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.safetensors_writer import Shard

_LAYOUT = 1  # of a shard's bytes: count on when names, order or header of what is in a shard change
_BASE_DIGESTS = "base_files"  # what is remembered of the bases' own files
_NO_STORE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class BaseStore:
    """The shards of one base in one dtype.

    Args:
        checkpoints: the folder that holds the checkpoints' folders.
        base_paths: every file that determines the base: config, weights, their index.
        dtype: of the shards' tensors.
    """

    def __init__(self, checkpoints: Path, base_paths: Iterable[Path], dtype: DType):
        self._root = checkpoints / STORE
        self._base_paths = list(base_paths)
        self._dtype = dtype

    @property
    def base_files(self) -> dict[str, dict]:
        """{"bytes", "blake3"} of the base's files by name; those that have changed since the last time are read."""
        return {path.name: describe_source_file(path, known.digest) for path, (known, _) in self._examined.items()}

    def examine_base(self) -> None:
        """Read what of the base has changed since the last time, for its digests."""
        _ = self._examined

    def bytes_missing(self, shards: Iterable[Shard], *, read_base: bool) -> int:
        """Size of those of the `shards` that are not stored yet.

        Args:
            read_base: read the base if its digests are not known; without it, a base not known has nothing stored.
        """
        known = read_base or all(recall(path, self._base_record(path)) for path in self._base_paths)
        return sum(shard.size_bytes for shard in shards if not known or self._stored(shard) is None)

    def provide(self, shard: Shard, target: Path, advance: Advance) -> tuple[dict, dict[str, str]]:
        """Make the file `target` from the store, after putting the shard there if it is not there yet.

        Where nothing can be shared (no links, no locks, or a store of somebody else's), `target` is simply written.

        Returns:
            What `Shard.write` does.

        Raises:
            OSError: from the file system: disk full, input/output error.
        """
        if not self._usable:
            return shard.write(target, advance)
        path = self._folder / shard.file
        with locked(self._root):  # a second builder of the same base waits here, and then finds the shard
            known = self._stored(shard)
            if known is None:
                known = self._make(shard, advance)
            else:
                advance(known.bytes)
            if recall(path, record_of(path)) is None:
                remember(known, record_of(path))
            share_file(path, target)
        return {"bytes": known.bytes, "sha256": known.digest}, known.tensors

    @cached_property
    def _folder(self) -> Path:
        digests = {name: described["blake3"] for name, described in self.base_files.items()}
        identity = {"layout": _LAYOUT, "dtype": str(self._dtype), "files": digests}
        return self._root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _examined(self) -> dict[Path, tuple[KnownFile, bool]]:
        """Per file of the base what is known of it, and whether that is new and may be remembered."""
        recalled = {path: recall(path, self._base_record(path)) for path in self._base_paths}
        found = {path: (known, False) for path, known in recalled.items() if known is not None}
        unknown = [path for path in self._base_paths if path not in found]
        with bar("Reading the base", sum(path.stat().st_size for path in unknown), in_bytes=True) as advance:
            for path in unknown:
                found[path] = examine(path)
                advance(path.stat().st_size)
        return {path: found[path] for path in self._base_paths}

    @cached_property
    def _usable(self) -> bool:
        """Whether files can be shared from here; if so, what was learnt of the base's files is recorded."""
        try:
            with locked(self._root):
                if not can_share(self._root):
                    return False
                (self._root / _BASE_DIGESTS).mkdir(exist_ok=True)
                for path, (known, is_new) in self._examined.items():
                    if is_new:
                        remember(known, self._base_record(path))
        except OSError as error:
            if error.errno in _NO_STORE:
                return False
            raise
        return True

    def _base_record(self, base_path: Path) -> Path:
        place = hashlib.sha256(os.fsencode(base_path.resolve())).hexdigest()[:16]
        return self._root / _BASE_DIGESTS / f"{place}.json"

    def _stored(self, shard: Shard) -> KnownFile | None:
        """The stored shard, or None if it is not there or not as it was made.

        One that looks different was changed, or came with the folder: a stranger's record would fit a stranger's shard.
        """
        path = self._folder / shard.file
        known = recall(path, record_of(path))
        if known is None or known.bytes != shard.size_bytes:
            return None
        with path.open("rb") as file:
            return known if file.read(len(shard.header)) == shard.header else None

    def _make(self, shard: Shard, advance: Advance) -> KnownFile:
        """Write the shard into the store, read-only: it is one file with all checkpoints that hold a hard link."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / shard.file
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            described, tensors = shard.write(partial, advance)
            partial.chmod(partial.stat().st_mode & 0o444)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return KnownFile.of(path, described["sha256"], tensors)
