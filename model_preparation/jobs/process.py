"""Runs one of our commands in a child process, which ends when its parent ends.

Ray sends this module to its workers, which may be unable to import the package. So this module imports the
standard library only.
"""

import codecs
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_BOOTSTRAP = str(Path(__file__).resolve().with_name("die_with_parent.py"))
_KEPT_CHARACTERS = 64_000  # at the end of the output
_SILENCE_SECONDS = 0.5  # between two checks of a process that prints nothing
_CLEAN_UP_SECONDS = 60.0  # for a process to end after SIGTERM
_REPORT_SECONDS = 1.0  # between two reports of the last printed line
_REASON_CHARACTERS = 160
_END_SECONDS = 120.0  # for the process of a lost worker to end


class Launch(NamedTuple):
    """A Python file with its arguments, the folder to run it in, and additional environment variables.

    `result_flag` is the command's flag for the file to which it writes its result, as a JSON object.
    """

    script: str
    arguments: tuple[str, ...]
    result_flag: str | None = None
    cwd: str | None = None
    variables: Mapping[str, str] = {}
    bootstrap: str = _BOOTSTRAP


class CommandProcess:
    """A command that runs inside a `with` block. If it still runs at the end of the block, it gets time to clean up.

    Args:
        launch: the command.
        merge: read stdout and stderr together. Otherwise only stderr is read, and stdout goes to our stdout.

    Attributes:
        output: the end of the text that was read.
        code: the exit code, set at the end of the block.
        result: the JSON object that the command wrote, set at the end of the block; None if it wrote none.
    """

    def __init__(self, launch: Launch, *, merge: bool):
        self._launch = launch
        self._merge = merge
        self.output = ""
        self.code: int | None = None
        self.result: dict[str, Any] | None = None

    def __enter__(self) -> "CommandProcess":
        launch = self._launch
        self._folder = tempfile.TemporaryDirectory()
        self._result_file = Path(self._folder.name) / "result.json"
        result = [launch.result_flag, str(self._result_file)] if launch.result_flag else []
        command = [launch.bootstrap, str(os.getpid()), sys.executable, launch.script, *launch.arguments, *result]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", *command],
            cwd=launch.cwd,
            env={**os.environ, **launch.variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._merge else None,
            stderr=subprocess.STDOUT if self._merge else subprocess.PIPE,
            # In the terminal's session, Ctrl-C would reach the command too. Our SIGTERM would then stop its clean-up.
            start_new_session=True,
        )
        pipe = self._process.stdout or self._process.stderr
        assert pipe is not None
        self._pipe = pipe
        self.pid = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_CLEAN_UP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._pipe.close()
        self.code = self._process.returncode
        try:
            result = json.loads(self._result_file.read_text(encoding="utf-8"))
            self.result = result if isinstance(result, dict) else None
        except (OSError, ValueError):
            self.result = None
        self._folder.cleanup()

    def printed(self) -> Iterator[str]:
        """Yield the text that the command prints, until it ends; "" after each half second of silence."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            readable, _, _ = select.select([self._pipe], [], [], _SILENCE_SECONDS)
            chunk = os.read(self._pipe.fileno(), 65536) if readable else b""
            # A process that the command started may keep the pipe open after the command has ended.
            if not chunk and (readable or self._process.poll() is not None):
                break
            text = decoder.decode(chunk)
            self.output = (self.output + text)[-_KEPT_CHARACTERS:]
            yield text
        self._process.wait()

    def last_line(self) -> str:
        """The last line of `output` that is not blank. Each state of a progress bar counts as a line."""
        lines = [line.strip() for line in self.output[-2000:].replace("\r", "\n").split("\n")]
        return next((line for line in reversed(lines) if line), "")


def failure(code: int, output: str) -> str:
    """Why a command failed, in one line: its last error line, the signal, or its last line. "" is success."""
    if code == 0:
        return ""
    lines = [line.strip() for line in output.replace("\r", "\n").split("\n") if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    if errors:
        return short(errors[-1])
    if code == -signal.SIGKILL:
        return "it was killed (signal 9); the system does this when memory runs out"
    if code < 0:
        return f"it was ended by signal {-code}"
    return short(f"exit code {code}: {lines[-1]}" if lines else f"exit code {code}")


def short(text: str) -> str:
    """The text in one line, short enough for a table."""
    return textwrap.shorten(text, _REASON_CHARACTERS, placeholder=" ...")


class Order(NamedTuple):
    """A job for a worker. If an earlier worker was lost, `predecessor` is (host, process id) of the job there."""

    launch: Launch
    needs: tuple[str, ...]
    with_gpu: bool
    predecessor: tuple[str, int] | None = None


def carry_out(order: Order) -> Iterator[tuple[Any, ...]]:
    """Run a job on a worker; yields events.

    Events are ("started", host, process id), ("line", last printed line), and finally ("ended", code, output, result).
    If a path in `needs` does not exist, nothing runs, and the only event is ("missing", host, path).
    """
    host = socket.gethostname()
    for path in order.needs:
        if not os.path.exists(path):
            yield "missing", host, path
            return
    if order.predecessor is not None and order.predecessor[0] == host:
        _wait_for_end(order.predecessor[1])
    launch = order.launch
    if not order.with_gpu:
        launch = launch._replace(variables={**launch.variables, "CUDA_VISIBLE_DEVICES": ""})
    with CommandProcess(launch, merge=True) as process:
        yield "started", host, process.pid
        reported, reported_at = "", 0.0
        for _ in process.printed():
            if time.monotonic() - reported_at >= _REPORT_SECONDS and (line := process.last_line()) != reported:
                reported, reported_at = line, time.monotonic()
                yield "line", line
    yield "ended", process.code, process.output, process.result


def _wait_for_end(process_id: int) -> None:
    """Wait until a killed process has ended, so that its locks and memory are free."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(process_id, 0)
        except (ProcessLookupError, PermissionError):  # PermissionError: another user's process has the id now
            return
        time.sleep(0.1)
