"""A second file with the same bytes that needs no second room on the disk.

It is a reflink where the file system can (both files share their bytes until one changes), else a hard link (one file
with two names), else a copy. Source: FICLONE, ioctl_ficlone(2).
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_DISK_AT_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def share_file(source: Path, target: Path) -> None:
    """Make `target`, a new file, a reflink, hard link or copy of `source`.

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    if not _reflink(source, target) and not _hard_link(source, target):
        shutil.copyfile(source, target)


def can_share(folder: Path) -> bool:
    """Whether the file system of `folder` has reflinks or hard links; tried with a small file."""
    with tempfile.TemporaryDirectory(prefix="probe.partial-", dir=folder) as probe:
        source, target = Path(probe, "source"), Path(probe, "target")
        source.write_bytes(bytes(4096))
        return _reflink(source, target) or _hard_link(source, target)


def can_reflink(folder: Path) -> bool:
    """Whether the file system of `folder` has reflinks; tried with two files without names."""
    try:
        with contextlib.ExitStack() as stack:
            source = os.open(folder, os.O_TMPFILE | os.O_RDWR)
            stack.callback(os.close, source)
            target = os.open(folder, os.O_TMPFILE | os.O_RDWR)
            stack.callback(os.close, target)
            os.write(source, bytes(4096))
            fcntl.ioctl(target, _FICLONE, source)
            return True
    except (OSError, AttributeError):  # a file system or a system without, or a full disk
        return False


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as file, target.open("xb") as clone:
        try:
            fcntl.ioctl(clone, _FICLONE, file.fileno())
            return True
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            if error.errno in _DISK_AT_FAULT:
                raise
            return False


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
        return True
    except OSError as error:  # no hard links here, too many links, or another user's source
        if error.errno in _DISK_AT_FAULT:
            raise
        return False
