"""What is to outlast a power cut: files and folders that are on the disk, and not only in memory.

In: paths. Out: nothing; when these return, the disk has it. A file is on the disk for good when it is synced and the
folder that holds its name is synced too.
"""

import errno
import os
from pathlib import Path


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
    """Make a folder, and those above it that are missing; what is there already is left as it is."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
