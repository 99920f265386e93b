"""A command of ours as a process of its own: started, listened to, ended with whoever started it.

In: a `Launch`. Out: a running process, what it prints, and the result it left in a JSON file. Only the standard library
is imported, as Ray's workers get this file by value and need not have the package.
"""

import codecs
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_BOOTSTRAP = str(Path(__file__).resolve().with_name("die_with_parent.py"))
_KEPT_CHARACTERS = 64_000  # the end of what a process printed


class Launch(NamedTuple):
    """What to run: a Python file with its arguments, in a folder, with variables beside those there are."""

    script: str
    arguments: tuple[str, ...]
    cwd: str | None = None
    variables: Mapping[str, str] = {}
    bootstrap: str = _BOOTSTRAP


class Output:
    """What a process printed, as text; only the end of it is kept."""

    def __init__(self) -> None:
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, chunk: bytes) -> str:
        """Take bytes in; returns them as text, without a character that is not complete yet."""
        new = self._decoder.decode(chunk)
        self.text = (self.text + new)[-_KEPT_CHARACTERS:]
        return new

    def last_line(self) -> str:
        """The last line that is not blank; a bar that redraws itself counts as lines."""
        lines = [line.strip() for line in self.text[-2000:].replace("\r", "\n").split("\n")]
        return next((line for line in reversed(lines) if line), "")


def start(launch: Launch, *, merge: bool) -> subprocess.Popen[bytes]:
    """Start it; it is killed when this process ends (on Linux).

    Args:
        merge: both its streams come through `stdout`; else `stderr` is a pipe, and stdout is ours.
    """
    command = [launch.bootstrap, str(os.getpid()), sys.executable, launch.script, *launch.arguments]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *command],
        cwd=launch.cwd,
        env={**os.environ, **launch.variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if merge else None,
        stderr=subprocess.STDOUT if merge else subprocess.PIPE,
        # In a session of its own it does not get the terminal's Ctrl-C beside our signal, which would cut its clean-up.
        start_new_session=True,
    )


def chunks(process: subprocess.Popen[bytes], every_seconds: float = 0.5) -> Iterator[bytes]:
    """What comes out of its pipe, to the end; b"" after each `every_seconds` of silence."""
    pipe = process.stdout or process.stderr
    assert pipe is not None
    while True:
        readable, _, _ = select.select([pipe], [], [], every_seconds)
        chunk = os.read(pipe.fileno(), 65536) if readable else b""
        # Something it started may keep the pipe open after its end.
        if not chunk and (readable or process.poll() is not None):
            break
        yield chunk
    process.wait()


def end(process: subprocess.Popen[bytes], patience_seconds: float = 60) -> None:
    """End it if it runs, with time to clean up first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def read_result(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None
