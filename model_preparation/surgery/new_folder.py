"""A folder that appears whole or not at all.

In: where it shall be. Out: a staging folder beside that place to write into, moved there by one rename when all is
written and on disk. Killed at any moment, the old folder or nothing is there, and perhaps `NAME.partial-*` beside it,
which the next run to the same place removes.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from model_preparation import interrupts
from model_preparation.errors import SurgeryError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, complete_mark: str) -> Iterator[Path]:
    """Stage a new `target`; it is put in place when the block ends without an exception.

    Args:
        target: the final place. A folder there without `complete_mark` and with at most a README.md counts as empty,
            and keeps its README.md.
        overwrite: whether a folder that is there is replaced. It stays whole until the new one is.
        complete_mark: the file whose presence makes such a folder complete.

    Raises:
        SurgeryError: if `target` is taken, or no folder can be made beside it.
    """
    check_target(target, overwrite=overwrite, complete_mark=complete_mark)
    target = target.resolve()
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    staging = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        staging.mkdir()
        yield staging
        if (target / "README.md").is_file() and not (staging / "README.md").exists():
            shutil.copy2(target / "README.md", staging)
        sync_tree(staging)
        interrupts.check()
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing_parents:
            with contextlib.suppress(OSError):  # it is not empty: the new folder is in it
                parent.rmdir()


def check_target(target: Path, *, overwrite: bool, complete_mark: str) -> None:
    """The checks of `new_folder`, without writing anything; raises as it does."""
    if target.is_dir():
        entries = {entry.name for entry in target.iterdir()}
        if complete_mark in entries and not overwrite:
            raise SurgeryError(f"{target} exists already. Choose another folder, or add --overwrite to replace it.")
        if complete_mark not in entries and entries - {"README.md"}:
            found = ", ".join(sorted(entries)[:3])
            raise SurgeryError(f"{target} holds other files ({found}) and no {complete_mark}. Choose another folder.")
    elif os.path.lexists(target):
        raise SurgeryError(f"{target} is a file, not a folder. Choose another place.")
    parent = existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise SurgeryError(f"{parent} is not a folder you can write to. Choose another place.")


def check_space(target: Path, needed_bytes: int) -> None:
    """Raise SurgeryError if the disk `target` will be on has fewer than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(existing_parent(target)).free
    if free_bytes < needed_bytes:
        raise SurgeryError(
            f"{target} needs {decimal(needed_bytes)}, but only {decimal(free_bytes)} are free on its disk. "
            "Make room or choose another disk."
        )


def existing_parent(target: Path) -> Path:
    """The nearest folder above `target` that exists."""
    return next(parent for parent in target.resolve().parents if parent.exists())


def sync_tree(folder: Path) -> None:
    """fsync every file and folder in `folder`, itself included."""
    for root, _, files in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in files), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    for folder in target.parent.glob(f"{target.name}.partial-*"):
        owner = folder.name.rpartition("-")[2]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(staging: Path, target: Path) -> None:
    if target.exists():
        _exchange(staging, target)
    else:
        staging.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names: in one step where the system can (Linux), else with the old one aside for a moment."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # a file system without exchange
            raise OSError(code, os.strerror(code), str(old))
    aside = old.with_name(f"{old.name}.old-{os.getpid()}")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
