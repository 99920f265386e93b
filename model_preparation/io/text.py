"""Reads text files as editors on any system save them: UTF-8, with or without a byte-order mark, with any line ends."""

import codecs
import contextlib
import io
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_MARKS = {  # longer ones first: UTF-32's mark begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode(data: bytes) -> str:
    """The text in `data`, without a byte-order mark.

    Raises:
        ValueError: if `data` is not UTF-8. The error says what it is, and what to do; the caller adds the file's name.
    """
    _check_beginning(data[:4])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 text ({error.reason}); save it as UTF-8") from None


def read_text(path: Path) -> str:
    """The text in a file. Every line end is changed to a newline.

    Raises:
        ValueError: as from `decode`; also for devices, sockets and FIFOs, which may never end. But
            FIFOs in /dev are read, such as that of <(command).
        OSError: if the file cannot be read.
    """
    _check_kind(path)
    return decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file that is too large to read at once. Its lines are the same as from `read_text`.

    Raises:
        ValueError: as from `read_text`. Some of these errors are only raised while the caller reads.
        OSError: if the file cannot be read.
    """
    _check_kind(path)
    try:
        with path.open("rb") as file:
            _check_beginning(file.peek(4)[:4])
            yield io.TextIOWrapper(file, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason}); save it as UTF-8") from None


def kind_of(mode: int) -> str:
    """What a path is if it is not a regular file, such as "a folder". `mode` is its `st_mode`."""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")


def _check_kind(path: Path) -> None:
    mode = path.stat().st_mode
    has_writer = stat.S_ISFIFO(mode) and str(path).startswith("/dev/")  # <(command), or a pipe as /dev/stdin
    if not has_writer and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder raises OSError
        raise ValueError(f"it is {kind_of(mode)}; save the text in a file")


def _check_beginning(beginning: bytes) -> None:
    name = next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), None)
    if len(beginning) == 4 and b"\0\0" in (beginning[::2], beginning[1::2]):  # two ASCII letters in UTF-16
        name = name or "UTF-16"
    if name is not None:
        raise ValueError(f"it is {name} text, which some editors call Unicode; save it as UTF-8")
