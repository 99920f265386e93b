"""A command of ours as a process of its own, which ends when the process that started it ends.

Ray's workers get this file by value and need not have the package, so it imports the standard library only.
"""

import codecs
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_BOOTSTRAP = str(Path(__file__).resolve().with_name("die_with_parent.py"))
_KEPT_CHARACTERS = 64_000  # of the end of the output
_SILENCE_SECONDS = 0.5  # between two looks at a process that prints nothing
_CLEAN_UP_SECONDS = 60.0  # for a process to end after SIGTERM
_SAYS_SECONDS = 1.0  # between two reports of a worker's last line
_GONE_SECONDS = 120.0  # for the process of a lost worker to end


class Launch(NamedTuple):
    """What to run: a Python file with its arguments, in a folder, with additional environment variables.

    With `result_flag`, the command gets a file by that flag, and writes its result there as a JSON object.
    """

    script: str
    arguments: tuple[str, ...]
    result_flag: str | None = None
    cwd: str | None = None
    variables: Mapping[str, str] = {}
    bootstrap: str = _BOOTSTRAP


class CommandProcess:
    """A running command. Leaving the context ends it, with time to clean up.

    Args:
        launch: what to run.
        merge: read both of its streams. Otherwise only stderr is read, and stdout goes to ours.

    Attributes:
        output: the end of what was read.
        code: the exit code, after the context.
        result: the JSON object that the command wrote, after the context; None if there is none.
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
            # In the terminal's session it would get Ctrl-C twice, from the terminal and from us, and not clean up.
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
        """What it prints, until it ends; "" after each half second of silence."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            readable, _, _ = select.select([self._pipe], [], [], _SILENCE_SECONDS)
            chunk = os.read(self._pipe.fileno(), 65536) if readable else b""
            # Something it started may keep the pipe open after its end.
            if not chunk and (readable or self._process.poll() is not None):
                break
            text = decoder.decode(chunk)
            self.output = (self.output + text)[-_KEPT_CHARACTERS:]
            yield text
        self._process.wait()

    def last_line(self) -> str:
        """The last line that is not blank. Each state of a progress bar counts as a line."""
        lines = [line.strip() for line in self.output[-2000:].replace("\r", "\n").split("\n")]
        return next((line for line in reversed(lines) if line), "")


class Order(NamedTuple):
    """A job for a worker. `predecessor` is (host, process) of the same job on a worker that was lost."""

    launch: Launch
    needs: tuple[str, ...]
    with_gpu: bool
    predecessor: tuple[str, int] | None = None


def carry_out(order: Order) -> Iterator[tuple[Any, ...]]:
    """What a worker does for an order. Gives events.

    They are ("started", host, process), ("says", line), and at last ("ended", code, output, result). If a path is
    missing, nothing runs, and the only event is ("blind", host, path).
    """
    host = socket.gethostname()
    for path in order.needs:
        if not os.path.exists(path):
            yield "blind", host, path
            return
    if order.predecessor is not None and order.predecessor[0] == host:
        _wait_until_gone(order.predecessor[1])
    launch = order.launch
    if not order.with_gpu:
        launch = launch._replace(variables={**launch.variables, "CUDA_VISIBLE_DEVICES": ""})
    with CommandProcess(launch, merge=True) as process:
        yield "started", host, process.pid
        said, said_at = "", 0.0
        for _ in process.printed():
            if time.monotonic() - said_at >= _SAYS_SECONDS and (line := process.last_line()) != said:
                said, said_at = line, time.monotonic()
                yield "says", line
    yield "ended", process.code, process.output, process.result


def _wait_until_gone(process_id: int) -> None:
    """Wait until a killed process has ended, and its locks and memory are free."""
    deadline = time.monotonic() + _GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(process_id, 0)
        except (ProcessLookupError, PermissionError):  # the latter: the id is another user's process by now
            return
        time.sleep(0.1)
