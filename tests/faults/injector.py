"""Runs functions in processes, with a fault at a chosen system call that changes a folder.

In: a function, the folder, and a `Fault` per run. Out: how each run ended, what it said, and the calls it made.
`shim.c` does the work in the child; it needs Linux on x86-64, gcc or cc, and seccomp.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

KINDS = {  # as in shim.c, where 0 is no fault
    "killed before": 1,
    "killed after": 2,
    "ENOSPC once": 3,
    "EIO once": 4,
    "disk full from then on": 5,
    "disk dead from then on": 6,
    "half written": 7,
    "half written, then full": 8,
}
WRITES_ONLY = ("half written", "half written, then full")

_PATH_BYTES, _TRACE_CALLS = 512, 4096


class _Call(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 20), ("path", ctypes.c_char * _PATH_BYTES), ("size_bytes", ctypes.c_long)]


class _Control(ctypes.Structure):
    _fields_ = [
        ("folder", ctypes.c_char * _PATH_BYTES),
        ("kind", ctypes.c_int),
        ("at", ctypes.c_long),
        ("no_exchange", ctypes.c_int),
        ("no_locks", ctypes.c_int),
        ("orders", ctypes.c_int),
        ("answers", ctypes.c_int),
        ("log", ctypes.c_int),
        ("logging", ctypes.c_int),
        ("counted", ctypes.c_long),
        ("done", ctypes.c_int),
        ("calls", _Call * _TRACE_CALLS),
    ]


class _Note(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 20),
        ("flags", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("inode", "mode", "size_bytes", "offset", "length")),
        ("paths", ctypes.c_char * _PATH_BYTES * 2),
    ]


@dataclass(frozen=True)
class Note:
    """A change that was made: the call's name, the paths in the call, and the changed file or folder after the call.

    A printed line is a note too. Its path is outside the folder, and `data` is the text.

    Attributes:
        flags: of open, rename, unlink and fallocate.
        offset: in the file, of the bytes written; -1 if none were.
    """

    name: str
    paths: list[Path]
    flags: int
    inode: int
    mode: int
    size_bytes: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Fault:
    """What goes wrong: `kind` (of `KINDS`) at call number `at`, from 0."""

    kind: str
    at: int


@dataclass(frozen=True)
class Call:
    """A system call that was counted: its name, the path it was about, and the bytes it was to write."""

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: 0, 1 for any exception, or minus the signal's number.
        error: the name of the exception's type, "" where there was none.
        output: what it printed, traceback included.
        calls: the calls counted.
        injected: whether the fault came to pass; not so if there were fewer calls than usual.
    """

    code: int
    error: str
    output: str
    calls: list[Call]
    injected: bool


def load_shim(folder: Path) -> ctypes.CDLL:
    """Compile the shim into `folder` and load it.

    Raises:
        RuntimeError: if it cannot work here; the message says why.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        raise RuntimeError("needs Linux on x86-64 and a C compiler")
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True, timeout=60)
    shim = ctypes.CDLL(str(library))
    with Injector(shim, lambda: None, folder) as injector:
        if injector.run().code:
            raise RuntimeError("needs a kernel with seccomp filters")
    return shim


class Injector:
    """Runs `function` any number of times in forked processes, counting its calls on what is in `folder`.

    After `prepare`, one process runs `function` up to the first such call. Every run is forked from there,
    so the folder must be the same before each run. (If the process has started threads by then, every run
    starts anew.)

    Args:
        no_exchange, no_locks: whether the file system acts as if it could not swap two folders, or lock.
    """

    def __init__(
        self,
        shim: ctypes.CDLL,
        function: Callable[[], object],
        folder: Path,
        *,
        no_exchange: bool = False,
        no_locks: bool = False,
    ):
        self._shim = shim
        self._function = function
        self._memory = mmap.mmap(-1, ctypes.sizeof(_Control))
        self._control = _Control.from_buffer(self._memory)
        self._control.folder = os.fsencode(folder.resolve())
        self._control.no_exchange, self._control.no_locks = no_exchange, no_locks
        self._printed = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (closed by __exit__)
        self._server: int | None = None
        self._orders = self._answers = -1

    def __enter__(self) -> "Injector":
        return self

    def __exit__(self, *exception) -> None:
        self._stop_server()
        self._printed.close()

    def prepare(self) -> None:
        """From now on, fork each run from where the first call that counts is made."""
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._control.orders, self._control.answers = orders, answers
        self._server = os.fork()
        if self._server == 0:
            os.close(self._orders)
            os.close(self._answers)
            self._be_child()
        os.close(orders)
        os.close(answers)

    def run(self, fault: Fault | None = None) -> Outcome:
        """Run the function once; nothing goes wrong without a `fault`."""
        self._control.counted = self._control.done = 0
        self._printed.seek(0)
        self._printed.truncate()
        order = (KINDS[fault.kind], fault.at) if fault else (0, -1)
        status = self._order(order)
        if status is None:
            self._control.kind, self._control.at = order
            self._control.orders = 0
            child = os.fork()
            if child == 0:
                self._be_child()
            status = os.waitpid(child, 0)[1]
        return self._outcome(status)

    def record(self) -> tuple[Outcome, list[Note]]:
        """Run the function once, anew, and note every change it makes in the folder and every line it prints."""
        assert self._server is None
        with tempfile.TemporaryFile() as log:
            self._control.log = log.fileno()
            outcome = self.run()
            self._control.log = 0
            log.seek(0)
            notes = []
            while header := log.read(ctypes.sizeof(_Note)):
                note = _Note.from_buffer_copy(header)
                paths = [Path(os.fsdecode(path.value)) for path in note.paths if path.value]
                shown = (note.flags, note.inode, note.mode, note.size_bytes, note.offset)
                notes.append(Note(note.name.decode(), paths, *shown, log.read(note.length)))
        return outcome, notes

    def _order(self, order: tuple[int, int]) -> int | None:
        """The exit status of a run by the server; None if there is no server, or it cannot serve."""
        if self._server is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._orders, struct.pack("ll", *order))
            if answer := os.read(self._answers, 4):
                return struct.unpack("i", answer)[0]
        self._stop_server()
        self._control.counted = self._control.done = 0
        return None

    def _stop_server(self) -> None:
        if self._server is not None:
            os.kill(self._server, signal.SIGKILL)
            os.waitpid(self._server, 0)
            os.close(self._orders)
            os.close(self._answers)
            self._server = None

    def _outcome(self, status: int) -> Outcome:
        self._printed.seek(0)
        output = self._printed.read().decode(errors="replace")
        calls = [
            Call(call.name.decode(), Path(os.fsdecode(call.path)), call.size_bytes)
            for call in self._control.calls[: min(self._control.counted, _TRACE_CALLS)]
        ]
        code = os.waitstatus_to_exitcode(status)
        error = output.rstrip().rpartition("\n")[2].partition(":")[0].rpartition(".")[2] if code == 1 else ""
        return Outcome(code, error, output, calls, bool(self._control.done))

    def _be_child(self) -> NoReturn:
        code = 1
        try:
            gc.freeze()  # a collection would touch, and so copy, every page that is shared with the parent
            os.dup2(self._printed.fileno(), 1)
            os.dup2(self._printed.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            if number := self._shim.inject(ctypes.byref(self._control)):
                raise OSError(number, os.strerror(number))
            self._function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)
