"""A file that appears whole or not at all.

In: where it shall be, and its content. Out: the file, put there by one rename when all is written and on disk.
"""

import os
from pathlib import Path

from model_preparation.errors import SurgeryError
from model_preparation.io.sync import sync


def check_new_file(path: Path) -> None:
    """Raise SurgeryError unless nothing is at `path` and a file can be made there."""
    if os.path.lexists(path):
        raise SurgeryError(f"{path} exists already. Choose another file, or remove it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise SurgeryError(f"{path.parent} is not a folder you can write to. Choose another place for {path.name}.")


def write_file(path: Path, content: str | bytes) -> None:
    """Put `content` at `path`, a text in UTF-8, in the place of a file that is there; it is on disk when this returns.

    Killed, it leaves `NAME.partial-PID` beside the file, or nothing.

    Raises:
        OSError: from the file system; what was at `path` is still there then.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # of a process of the same number, or a link that somebody put there
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
