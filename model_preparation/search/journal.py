"""Every evaluation of a search, in a file to which lines are only added. A line is a JSON object with its own digest.

A line is on the disk when `append` returns. A crash may cut the last line, and a power failure may leave zeros in it.
Such a line was never complete, so it is removed. Any other damage is an error.
"""

import json
import os
from pathlib import Path
from typing import Any

from blake3 import blake3
from filelock import lock_descriptor

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import make_folder, sync
from model_preparation.io.untrusted.untrusted_files import parse_json, regular_file

_CHECK = "check"
_CHECK_DIGITS = 16


class Journal:
    """A journal. Until it is closed, no other process can open it.

    Attributes:
        entries: all entries of the journal.

    Raises:
        SurgeryError: if another process has it open, or a line is damaged.
        OSError: from the file system.
    """

    def __init__(self, path: Path):
        self.path = path
        make_folder(path.parent)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not lock_descriptor(self._descriptor, blocking=False):
                raise SurgeryError(
                    f"Another search writes to {path}. Wait until it ends, or choose another --output_dir."
                )
            sync(path.parent)
            self.entries = self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry. It is on the disk when this method returns."""
        line = _line(entry)
        start = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(28, "No space left on device", str(self.path))
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, start)  # the next entry must not follow half a line
            raise
        self.entries.append(entry)

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self) -> list[dict[str, Any]]:
        data = regular_file(self.path).read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        last = whole.rfind(b"\n", 0, -1) + 1
        if b"\0" in whole[last:]:
            whole = whole[:last]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))
            os.fsync(self._descriptor)
        entries = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                entry = parse_json(line)
                entry.pop(_CHECK)
                is_whole = _line(entry) == line + b"\n"
            except (ValueError, KeyError, AttributeError, TypeError):
                is_whole = False
            if not is_whole:
                raise SurgeryError(
                    f"Line {number} of {self.path} is damaged. Remove that line, and its evaluation is made again."
                )
            entries.append(entry)
        return entries


def _line(entry: dict[str, Any]) -> bytes:
    digest = blake3(json.dumps(entry).encode()).hexdigest()[:_CHECK_DIGITS]
    return json.dumps({**entry, _CHECK: digest}).encode() + b"\n"
