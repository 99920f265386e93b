"""Starts the process of reader.py, asks it for one layer after another, and checks every answer.

An answer is a safetensors file, in which every range is checked, and a dict of plain values. The process gets only the
environment variables that Python needs to start, so it has no access tokens and no proxies.
"""

import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_ranges import TensorRange, safetensors_ranges
from model_preparation.legacy.reader import LAYER
from model_preparation.terminal import escaped

_READER = "model_preparation.legacy.reader"
_VARIABLES_KEPT = {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME"}
_KINDS = {"config": (dict, type(None)), "attention": (dict,), "eps": (float, int, type(None)), "not_run": (list,)}
_MAX_ANSWER_BYTES = 1_000_000
_MAX_SECONDS_PER_LAYER = 900  # one layer of the largest Llama has some 6 GB


@contextlib.contextmanager
def legacy_process(folder: Path, allow_network: bool) -> Iterator["LegacyProcess"]:
    """A running reader, which writes to the empty `folder`. It ends with the context.

    Raises:
        SurgeryError: if the process still has network access, unless `allow_network`.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-m", _READER, str(folder)],
            cwd=folder,
            env=_environment(folder),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # so Ctrl-C does not reach it: it would print a second traceback
        ) as process,
    ):
        try:
            reader = LegacyProcess(process, errors, folder)
            restrictions = reader.answer("starting")
            if not (restrictions.get("namespace") or restrictions.get("sockets") or allow_network):
                raise SurgeryError(
                    "Nothing was opened, because a process on this system cannot give up its network access (on Linux, "
                    "unshare and seccomp do this). Import the files on Linux, or add --allow_network."
                )
            yield reader
        finally:
            process.kill()


class LegacyProcess:
    """The running reader that `legacy_process` gives."""

    def __init__(self, process: subprocess.Popen, errors: IO[bytes], folder: Path):
        self._process = process
        self._errors = errors
        self._folder = folder

    def read(self, path: Path) -> tuple[dict[str, TensorRange], dict[str, Any]]:
        """Where one file's tensors lie, and the dict from `reader.read_layer`. The tensors stay until the next `read`.

        Raises:
            SurgeryError: if the file holds no decoder layer, or the process ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: `answer` reports it
            self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
        answer = self.answer(f"reading {path}")
        if "fault" in answer:
            raise SurgeryError(
                f"{path} cannot be imported: {_printable(answer['fault'])}. Leave it out, or copy it again."
            )
        if not all(isinstance(answer.get(name, self), kinds) for name, kinds in _KINDS.items()):
            raise SurgeryError(f"The separate process gave no valid answer for {path}. Do not use this file.")
        written = self._folder / LAYER
        if not (written.exists() and stat.S_ISREG(written.lstat().st_mode)):
            raise SurgeryError(f"The process reading {path} wrote no tensors. Do not use this file.")
        answer["not_run"] = [_printable(name) for name in answer["not_run"]]
        return safetensors_ranges(written), answer

    def answer(self, doing: str) -> dict[str, Any]:
        """The dict on the process's next line; raises SurgeryError if the process ends or prints something else."""
        assert self._process.stdout is not None
        timer = threading.Timer(_MAX_SECONDS_PER_LAYER, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline(_MAX_ANSWER_BYTES)
            if not line:
                code = self._process.wait()
                ending = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise SurgeryError(
                    f"The separate process {ending} while {doing}{self._last_error_line()}. "
                    "Nothing was imported; check the free memory and the file."
                )
        finally:
            timer.cancel()
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise SurgeryError(f"The separate process gave no valid answer while {doing}. Do not use this file.")
        return answer

    def _last_error_line(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        lines = self._errors.read().decode(errors="replace").splitlines()
        return f" ({_printable(lines[-1])})" if lines else ""


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _VARIABLES_KEPT}
    # The process must import the same package as this one.
    paths = [
        str(Path(__file__).resolve().parents[2]),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def _printable(text: Any) -> str:
    """A stranger's text in one short line without control characters."""
    return escaped(" ".join(str(text)[:300].split())).rstrip(" .")
