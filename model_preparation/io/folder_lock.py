"""Locks the folder NAME.partial, which is next to NAME. One run at a time prepares NAME there.

The run locks the file `.held_by` in NAME.partial (flock). The lock ends with the process, even if the process is
killed. `.held_by` contains the process id. It also shows that this program made the folder and may empty it.
Therefore `.held_by` is made first and removed last.

On file systems without locks, every run has its own folder, NAME.partial-HOST-PID. Such a folder counts as abandoned if
its process ran on this host and has ended.
"""

import contextlib
import errno
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import lock_descriptor

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import make_folder, sync
from model_preparation.io.untrusted.untrusted_files import read_json

HELD_BY = ".held_by"

_NAME = re.compile(r"(?P<target>.+)\.partial(?P<owner>-.+)?", re.DOTALL)
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# The folders that this process holds without a lock. An earlier process with its id may have left more.
_held_without_lock: set[Path] = set()


class Hold:
    """`folder` is NAME.partial, which this process holds."""

    def __init__(self, folder: Path, descriptor: int):
        self.folder = folder
        self._descriptor = descriptor

    def is_intact(self) -> bool:
        """Whether `folder` is still the folder taken. If someone deleted it, another run may have made a new one."""
        ours = os.fstat(self._descriptor)
        try:
            there = (self.folder / HELD_BY).lstat()
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def entries(self) -> list[Path]:
        """What is in the folder, except `.held_by`."""
        return [path for path in self.folder.iterdir() if path.name != HELD_BY]

    def release(self) -> None:
        """Release the lock; the folder is removed if it is empty."""
        try:
            with contextlib.suppress(OSError):
                if self.is_intact() and not self.entries():
                    sync(self.folder)
                    (self.folder / HELD_BY).unlink()
        finally:
            os.close(self._descriptor)
            _held_without_lock.discard(self.folder)
        with contextlib.suppress(OSError):  # it is not empty, or another run already holds it
            self.folder.rmdir()


def take(target: Path) -> Hold:
    """Hold the partial folder of `target`. It and its parents are made if they are missing.

    Files that an earlier run left in the partial folder stay there.

    Raises:
        SurgeryError: if another process holds the folder, or if this program did not make it.
    """
    folder = target.with_name(f"{target.name}.partial")
    try:
        if (hold := _take(folder)) is not None:
            return hold
        folder = target.with_name(f"{folder.name}-{socket.gethostname()}-{os.getpid()}")
        if folder in _held_without_lock:
            raise BlockingIOError
        _held_without_lock.add(folder)
        return _signed(_open(folder))
    except BlockingIOError:
        raise SurgeryError(
            f"{target} is being written by {_holder(folder)}. Wait until that ends, or choose another folder."
        ) from None


def take_abandoned(parent: Path, only_for: Path | None = None) -> Iterator[tuple[Hold, Path]]:
    """Hold the partial folders that killed runs left in `parent`, one by one; yields each with its target.

    Args:
        parent: the folder to look in.
        only_for: yield only the folders of this target.
    """
    for folder in sorted(parent.iterdir()):
        match = _NAME.fullmatch(folder.name)
        if match is None or not _is_ours(folder) or only_for not in (None, parent / match["target"]):
            continue
        hold = None
        with contextlib.suppress(BlockingIOError, SurgeryError):  # the folder is in use, or another user owns it
            if not match["owner"]:
                hold = _take(folder)
            elif _has_ended(match["owner"]) and folder not in _held_without_lock:
                hold = _signed(_open(folder))
        if hold is not None:
            yield hold, parent / match["target"]


def is_partial(name: str) -> bool:
    """Whether a folder with this name counts as unfinished."""
    return _NAME.fullmatch(name) is not None


def _take(folder: Path) -> Hold | None:
    """Make and lock the folder; None if the file system has no locks. Raises BlockingIOError if it is locked."""
    while True:
        hold = _open(folder)
        try:
            if not lock_descriptor(hold._descriptor, blocking=False):
                raise BlockingIOError
        except OSError as error:
            if error.errno in _NO_LOCKS:
                hold.release()
                return None
            os.close(hold._descriptor)
            raise
        if hold.is_intact():
            return _signed(hold)
        os.close(hold._descriptor)  # its last holder removed the folder after this run opened it


def _open(folder: Path) -> Hold:
    """Make the folder and its `.held_by` if they are missing, and open `.held_by`."""
    while True:
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if not _is_ours(folder):
            raise SurgeryError(f"{folder} is in the way: no run of this program made it. Move it elsewhere.")
        try:
            return Hold(folder, os.open(folder / HELD_BY, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        except FileNotFoundError:
            continue  # its holder has just removed the folder
        except PermissionError:
            raise SurgeryError(
                f"{folder} belongs to another user ({_holder(folder)}). Choose another folder, or ask for its removal."
            ) from None


def _signed(hold: Hold) -> Hold:
    """Write into `.held_by` that this process holds the folder."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    try:
        os.ftruncate(hold._descriptor, 0)
        os.pwrite(hold._descriptor, text.encode(), 0)
        sync(hold.folder)
    except BaseException:
        hold.release()
        raise
    return hold


def _holder(folder: Path) -> str:
    try:
        fields = read_json(folder / HELD_BY)
        return f"process {fields['pid']} on {fields['host']} since {fields['since']}"
    except (OSError, ValueError, KeyError, SurgeryError):
        return "another process"  # that process has not written `.held_by` yet, or is ending


def _is_ours(folder: Path) -> bool:
    """Whether this program may empty the folder: it holds a file `.held_by`, or it is empty, or it is gone."""
    try:
        # List the folder only once: between two listings, one run may remove the folder and another make it again.
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        files = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(folder)}
    except FileNotFoundError:
        return True
    # NFS renames a file to .nfs... if it is deleted while it is open.
    return files.get(HELD_BY) or all(name.startswith(".nfs") for name in files)


def _has_ended(owner: str) -> bool:
    """Whether the process in "-HOST-PID" ran on this host and has ended."""
    host, _, process_id = owner[1:].rpartition("-")
    if host != socket.gethostname() or not process_id.isdigit():
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(process_id) == os.getpid()  # an earlier process had the same id
