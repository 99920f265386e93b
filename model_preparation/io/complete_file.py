"""Files that appear whole or not at all, and files and folders that outlast a power cut.

A file is safe when it is synced and the folder that holds its name is synced too.
"""

import errno
import os
from pathlib import Path

from model_preparation.errors import SurgeryError


def check_new_file(path: Path) -> None:
    """Raise SurgeryError unless nothing is at `path` and a file can be made there."""
    if os.path.lexists(path):
        raise SurgeryError(f"{path} exists already. Choose another file, or remove it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise SurgeryError(f"{path.parent} is not a folder you can write to. Choose another place for {path.name}.")


def write_file(path: Path, content: str | bytes) -> None:
    """Put `content` at `path`, text as UTF-8; an existing file is replaced. It is on the disk on return.

    A killed process leaves the old file, and perhaps `NAME.partial-PID`.

    Raises:
        OSError: from the file system; the old file is still there then.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # left by a process with the same id, or a stranger's link
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
    """fsync every file in `folder`, `marker_file` after all others, then every folder, `folder` itself last."""
    files, folders = [], []
    for root, _, names in os.walk(folder, topdown=False):
        files += [Path(root, name) for name in names]
        folders.append(Path(root))
    for path in [*sorted(files, key=lambda path: path == folder / marker_file), *folders]:
        sync(path)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents; they are on the disk on return."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
