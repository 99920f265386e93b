"""Writes files that appear whole or not at all, and syncs files and folders so that they survive a power cut.

A file survives only if both the file and the folder that holds its name were synced.
"""

import errno
import os
from pathlib import Path

from model_preparation.errors import SurgeryError


def check_new_file(path: Path) -> None:
    """Raise SurgeryError if something is at `path`, or if no file can be made there."""
    if os.path.lexists(path):
        raise SurgeryError(f"{path} exists already. Choose another file, or remove it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise SurgeryError(f"{path.parent} is not a folder you can write to. Choose another place for {path.name}.")


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` (text as UTF-8), and sync it. An existing file is replaced.

    If the process is killed, an old file stays whole, and `NAME.partial-PID` may be left.

    Raises:
        OSError: from the file system. An old file is then still whole, or replaced by the new one.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # an earlier process with the same id left it, or it is a stranger's link
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, marker_file: str) -> None:
    """fsync every file in `folder`, with `marker_file` last; then fsync every folder, with `folder` itself last."""
    files, folders = [], []
    for root, _, names in os.walk(folder, topdown=False):
        files += [Path(root, name) for name in names]
        folders.append(Path(root))
    for path in [*sorted(files, key=lambda path: path == folder / marker_file), *folders]:
        sync(path)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents. After a power failure they are still there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
