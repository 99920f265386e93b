"""What a batch runs: one of our commands for each checkpoint, here one after the other (ray_jobs.py: many at once).

In: `Job`s. Out: per job, how its process ended, in the order in which they end. A job that fails stops no other.
"""

import shlex
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation.jobs.process import Launch, Output, chunks, end, read_result, start

_REASON_CHARACTERS = 160


@dataclass(frozen=True)
class Job:
    """One run of a command.

    `needs` are paths that whoever runs it must see, `writes_to` a folder that must be the same one for all of them.
    With `result_flag`, the command is given a file by that flag, and what it writes there (JSON) is the result.
    """

    name: str
    script: Path
    arguments: tuple[str, ...]
    needs: tuple[Path, ...] = ()
    writes_to: Path | None = None
    result_flag: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a job ended: `reason` says why it failed, in a line, and is "" if it did not."""

    reason: str
    seconds: float
    result: dict[str, Any] | None = None


Runner = Callable[[Sequence[Job]], Iterator[tuple[int, Ended]]]


def run_in_turn(jobs: Sequence[Job]) -> Iterator[tuple[int, Ended]]:
    """Run the jobs one after the other, in the terminal we have; gives the index of each with how it ended.

    Whatever interrupts this ends the running one too, with time to clean up.
    """
    for index, job in enumerate(jobs):
        started = time.monotonic()
        print(f"\n[{index + 1}/{len(jobs)}] {job.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result_file = Path(folder) / "result.json"
            launch = Launch(str(job.script), arguments_of(job, result_file))
            print("+ " + shlex.join([sys.executable, launch.script, *job.arguments]), flush=True)
            process = start(launch, merge=False)
            output = Output()
            try:
                for chunk in chunks(process):
                    # Its stdout is ours already, with its bars; what it says of its failure is needed here too.
                    sys.stderr.write(output.add(chunk))
                    sys.stderr.flush()
            finally:
                end(process)
            reason = failure(process.returncode, output.text)
            yield index, Ended(reason, time.monotonic() - started, read_result(result_file))


def arguments_of(job: Job, result_file: Path) -> tuple[str, ...]:
    """The job's arguments, with the flag for its result."""
    return (*job.arguments, job.result_flag, str(result_file)) if job.result_flag else job.arguments


def failure(code: int, output: str) -> str:
    """Why a command failed, in a line: what it reports as its error, else the last it said. "" if it did not fail."""
    if code == 0:
        return ""
    lines = [line.strip() for line in output.replace("\r", "\n").split("\n") if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    if errors:
        return short(errors[-1])
    if code == -signal.SIGKILL:
        return "it was killed (signal 9), as the system does when memory runs out"
    if code < 0:
        return f"it was ended by signal {-code}"
    return short(f"exit code {code}: {lines[-1]}" if lines else f"exit code {code}")


def short(text: str) -> str:
    """`text` in one line that fits a table."""
    return textwrap.shorten(text, _REASON_CHARACTERS, placeholder=" ...")
