"""Writes folders that appear whole or not at all.

A new folder NAME is first written as `NAME.partial/new`, next to NAME. When all of it is on the disk, one rename moves
it into place. If the program is killed or the power fails before the rename, NAME is still the old folder, or absent.
`NAME.partial` may be left. The next run that writes NAME removes `NAME.partial`, and so does `remove_abandoned`.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.filesize import decimal

from model_preparation import interrupts
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import sync, sync_tree
from model_preparation.io.folder_lock import Hold, is_partial, take, take_abandoned

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NEW, _OLD = "new", "old"  # in NAME.partial; `old` is needed if the file system cannot swap two folders in one step


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, marker_file: str) -> Iterator[Path]:
    """Yield an empty folder. It becomes `target` when the block ends without an exception.

    Args:
        target: the final place. A folder there counts as empty if it holds nothing or only a README.md, which is kept.
        overwrite: whether to replace a complete folder. The old one stays until the new one is complete.
        marker_file: the file that only complete folders have.

    Raises:
        SurgeryError: if `check_target` refuses `target`, or if another run is writing it.
        OSError: from the file system, such as for a full disk, even if a library raised another exception.
    """
    check = partial(check_target, target, overwrite=overwrite, marker_file=marker_file)
    check()
    target = target.resolve()
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        with _held(target) as hold:
            check()  # again: another run may just have written `target`
            staging = hold.folder / _NEW
            staging.mkdir()
            with _os_errors(target):
                yield staging
            if (target / "README.md").is_file() and not (staging / "README.md").exists():
                shutil.copy2(target / "README.md", staging, follow_symlinks=False)
            sync_tree(staging, marker_file)
            interrupts.check()
            check()  # again: hours may have passed
            if not hold.is_intact():
                raise SurgeryError(f"{hold.folder} was deleted while it was in use. Run the command again.")
            _put_in_place(staging, target)
    finally:
        for parent in missing_parents:
            with contextlib.suppress(OSError):  # the parent is not empty: the new folder is in it
                parent.rmdir()


def remove_abandoned(parent: Path, *, only_for: Path | None = None, dry_run: bool = False) -> list[Path]:
    """Remove what killed runs left in the folder `parent`: every `NAME.partial` that this program made and no run uses.

    If NAME is missing and an old NAME is in `NAME.partial`, the old NAME is first moved back to its place.

    Args:
        parent: the folder to look in.
        only_for: remove only the partial folders of this NAME.
        dry_run: remove nothing.

    Returns:
        The removed folders; with `dry_run`, those that would be removed.

    Raises:
        SurgeryError: if a folder cannot be removed.
    """
    removed = []
    for hold, target in take_abandoned(parent, only_for):
        removed.append(hold.folder)
        if dry_run:
            hold.release()
        else:
            _clear_and_release(hold, target)
    return removed


def check_target(target: Path, *, overwrite: bool, marker_file: str) -> None:
    """Raise SurgeryError if `new_folder` would refuse `target`. Nothing is written."""
    if is_partial(target.name):
        raise SurgeryError(f"{target} has the name of an unfinished folder (.partial). Choose another name.")
    if target.is_dir():
        entries = {entry.name for entry in target.iterdir()}
        if marker_file in entries and not overwrite:
            raise SurgeryError(f"{target} exists already. Choose another folder, or add --overwrite to replace it.")
        if marker_file not in entries and entries - {"README.md"}:
            found = ", ".join(sorted(entries)[:3])
            raise SurgeryError(f"{target} holds other files ({found}) and no {marker_file}. Choose another folder.")
    elif target.is_symlink() and not target.exists():
        raise SurgeryError(f"{target} is a link that leads nowhere. Choose another place, or remove the link.")
    elif os.path.lexists(target):
        raise SurgeryError(f"{target} is a file, not a folder. Choose another place.")
    parent = existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise SurgeryError(f"{parent} is not a folder you can write to. Choose another place.")


def check_space(target: Path, needed_bytes: int) -> None:
    """Raise SurgeryError if fewer than `needed_bytes` are free on the disk for `target`."""
    free_bytes = shutil.disk_usage(existing_parent(target)).free
    abandoned = target.resolve().with_name(f"{target.resolve().name}.partial")  # this is removed first
    free_bytes += sum(path.lstat().st_blocks * 512 for path in abandoned.glob(f"{_NEW}/**/*"))
    if free_bytes < needed_bytes:
        raise SurgeryError(
            f"{target} needs {decimal(needed_bytes)}, but only {decimal(free_bytes)} are free on its disk. "
            "Make room or choose another disk."
        )


def existing_parent(target: Path) -> Path:
    """The nearest folder above `target` that exists."""
    return next(parent for parent in target.resolve().parents if parent.exists())


@contextlib.contextmanager
def _os_errors(target: Path) -> Iterator[None]:
    """Turn errors of tokenizers and safetensors, such as "... (os error 28)", into OSError."""
    try:
        yield
    except Exception as error:
        match = _OS_ERROR.search(str(error))
        if match is None or isinstance(error, OSError | SurgeryError):
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(target)) from error


@contextlib.contextmanager
def _held(target: Path) -> Iterator[Hold]:
    """Hold `target`'s partial folder. It is emptied at the beginning and at the end."""
    hold = take(target)
    try:
        _clear(hold, target)
        for abandoned, _ in take_abandoned(target.parent, target):
            _clear_and_release(abandoned, target)
        yield hold
    finally:
        with contextlib.suppress(OSError, SurgeryError):  # the next run removes what is left
            _clear_and_release(hold, target)


def _clear_and_release(hold: Hold, target: Path) -> None:
    try:
        _clear(hold, target)
    finally:
        hold.release()


def _clear(hold: Hold, target: Path) -> None:
    """Empty a partial folder. If the old `target` is in it and `target` is absent, the old one is first moved back."""
    if not hold.is_intact():
        return
    if not target.exists() and (hold.folder / _OLD).is_dir() and not (hold.folder / _OLD).is_symlink():
        (hold.folder / _OLD).rename(target)
        sync(target.parent)
    for path in hold.entries():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    if hold.entries():
        raise SurgeryError(f"{hold.folder} was left by a killed run and cannot be removed. Remove it yourself.")


def _put_in_place(staging: Path, target: Path) -> None:
    if target.exists():
        _exchange(staging, target)
    else:
        staging.rename(target)
    try:
        sync(target.parent)
        sync(staging.parent)
    except OSError:
        with contextlib.suppress(OSError):  # undo it
            if staging.exists():
                _exchange(staging, target)
            else:
                target.rename(staging)
        raise


def _exchange(new: Path, old: Path) -> None:
    """Put `new` in the place of `old` by a swap. If that is impossible, first move `old` into NAME.partial."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # both mean: it cannot swap
            raise OSError(code, os.strerror(code), str(old))
    sync(old.parent)  # NAME.partial must be on the disk before the old folder is moved into it
    old.rename(new.with_name(_OLD))  # if the program is killed now, the next run moves it back
    new.rename(old)
