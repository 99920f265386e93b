"""Runs a function in a forked process that is stopped at a chosen system call that changes a folder.

In: a function, and a `Fault`. Out: how the process ended, what it said, and the calls it made. `shim.c` does the work in
the child; it is compiled once, and needs Linux on x86-64, gcc or cc, and seccomp.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
_SECONDS = 120  # more than any of the functions needs


class _Call(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 20), ("path", ctypes.c_char * _PATH_BYTES), ("size_bytes", ctypes.c_long)]


class _Control(ctypes.Structure):
    _fields_ = [
        ("folder", ctypes.c_char * _PATH_BYTES),
        ("kind", ctypes.c_int),
        ("at", ctypes.c_long),
        ("no_exchange", ctypes.c_int),
        ("no_locks", ctypes.c_int),
        ("counted", ctypes.c_long),
        ("done", ctypes.c_int),
        ("calls", _Call * _TRACE_CALLS),
    ]


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
    """How the process ended.

    Attributes:
        code: 0, 1 for any exception, or minus the signal's number.
        error: the exception's type, "" where there was none.
        output: what it printed, traceback included.
        calls: the calls counted.
        injected: whether the fault came to pass; not so if there were fewer calls than usual.
    """

    code: int
    error: str
    output: str
    calls: list[Call]
    injected: bool


class Injector:
    """The shim, compiled and loaded.

    Raises:
        RuntimeError: if it cannot work here; the message says why.
    """

    def __init__(self, folder: Path):
        compiler = shutil.which("gcc") or shutil.which("cc")
        if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
            raise RuntimeError("needs Linux on x86-64 and a C compiler")
        library = folder / "shim.so"
        source = Path(__file__).with_name("shim.c")
        command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source]
        subprocess.run(command, check=True, timeout=60)
        self._inject = ctypes.CDLL(str(library)).inject
        self._memory = mmap.mmap(-1, ctypes.sizeof(_Control))
        self._control = _Control.from_buffer(self._memory)
        if self.run(lambda: None, folder).code:
            raise RuntimeError("needs a kernel with seccomp filters")

    def run(
        self,
        function: Callable[[], object],
        folder: Path,
        fault: Fault | None = None,
        *,
        no_exchange: bool = False,
        no_locks: bool = False,
    ) -> Outcome:
        """Run `function` in a forked process, counting calls on what is in `folder`.

        Args:
            fault: what goes wrong in it; nothing by default.
            no_exchange, no_locks: be a file system that cannot swap two folders, or cannot lock.
        """
        control = self._control
        control.folder = os.fsencode(folder.resolve())
        control.kind, control.at = (KINDS[fault.kind], fault.at) if fault else (0, -1)
        control.no_exchange, control.no_locks = no_exchange, no_locks
        control.counted = control.done = 0
        with tempfile.TemporaryFile() as printed:
            child = os.fork()
            if child == 0:
                self._be_child(function, printed.fileno())
            status = os.waitpid(child, 0)[1]
            printed.seek(0)
            output = printed.read().decode(errors="replace")
        calls = [
            Call(call.name.decode(), Path(os.fsdecode(call.path)), call.size_bytes)
            for call in control.calls[: min(control.counted, _TRACE_CALLS)]
        ]
        code = os.waitstatus_to_exitcode(status)
        error = output.rstrip().rpartition("\n")[2].partition(":")[0] if code == 1 else ""
        return Outcome(code, error, output, calls, bool(control.done))

    def _be_child(self, function: Callable[[], object], output: int) -> None:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_SECONDS)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            if number := self._inject(ctypes.byref(self._control)):
                raise OSError(number, os.strerror(number))
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)
