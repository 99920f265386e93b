"""Makes a second file with the same bytes. Where possible, the second file needs no more space on the disk.

If the file system has reflinks, the second file is a reflink: the two share their blocks until one of them changes.
Otherwise it is a hard link (one file with two names). If a hard link is impossible too, it is a copy.
"""

import errno
import fcntl
import os
import shutil
import struct
import tempfile
from pathlib import Path

_FICLONERANGE = 0x4020940D  # linux/fs.h
_DISK_AT_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def share_file(source: Path, target: Path) -> None:
    """Make the new file `target`: a reflink, a hard link or a copy of `source`.

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    if not _reflink(source, target) and not _hard_link(source, target):
        shutil.copyfile(source, target)


def share_range(source: int, target: int, start: int = 0, size_bytes: int = 0, position: int = 0) -> bool:
    """Let two open files share whole blocks on the disk. Return False if this is impossible.

    `source` and `target` are file descriptors. `start` is the offset in the source, `position` in the target.
    `size_bytes` 0 means all up to the source's end. XFS and Btrfs can share blocks between files of one file system
    (ioctl_ficlonerange(2)).

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, start, size_bytes, position))
        return True
    except OSError as error:
        if error.errno in _DISK_AT_FAULT:
            raise
        return False


def can_share(folder: Path) -> bool:
    """Whether the file system of `folder` has reflinks or hard links. A small file is made to find out."""
    with tempfile.TemporaryDirectory(prefix="probe.partial-", dir=folder) as probe:
        source, target = Path(probe, "source"), Path(probe, "target")
        source.write_bytes(bytes(4096))
        return _reflink(source, target) or _hard_link(source, target)


def can_reflink(folder: Path) -> bool:
    """Whether the file system of `folder` has reflinks. Two files without names are made to find out."""
    try:
        with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as target:
            os.write(source.fileno(), bytes(4096))
            return share_range(source.fileno(), target.fileno())
    except OSError:  # a full disk, or a folder that this user may not write to
        return False


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as file, target.open("xb") as clone:
        shared = False
        try:
            shared = share_range(file.fileno(), clone.fileno())
        finally:
            if not shared:
                target.unlink(missing_ok=True)
        return shared


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
        return True
    except OSError as error:  # hard links do not work here, the file has too many, or another user owns it
        if error.errno in _DISK_AT_FAULT:
            raise
        return False
