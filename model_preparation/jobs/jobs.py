"""Jobs are runs of our commands. This file runs them one after the other; ray_jobs.py runs many at once."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from model_preparation.jobs.process import CommandProcess, Launch, failure

Outcome = TypeVar("Outcome")  # what a command records about an ended job, and prints as a row of its table


@dataclass(frozen=True)
class Job:
    """One run of a command.

    Attributes:
        name: what people see.
        script, arguments: the Python file and its arguments.
        needs: paths that must exist on the machine that runs the job.
        writes_to: a folder that the job writes to; all machines must share it.
        result_flag: as in `Launch`.
    """

    name: str
    script: Path
    arguments: tuple[str, ...]
    needs: tuple[Path, ...] = ()
    writes_to: Path | None = None
    result_flag: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a job ended. `reason` says in one line why it failed; "" means success. For `result` see `CommandProcess`."""

    reason: str
    seconds: float
    result: dict[str, Any] | None = None


# A function that runs jobs. When a job ends, the function yields the job's index and its `Ended`. A failed job does not
# stop the other jobs.
Runner = Callable[[Sequence[Job]], Iterator[tuple[int, Ended]]]


def run_in_turn(jobs: Sequence[Job]) -> Iterator[tuple[int, Ended]]:
    """Run jobs one after the other in this terminal. After Ctrl-C, the running job has time to clean up."""
    for index, job in enumerate(jobs):
        started = time.monotonic()
        print(f"\n[{index + 1}/{len(jobs)}] {job.name}", flush=True)
        print("+ " + shlex.join([sys.executable, str(job.script), *job.arguments]), flush=True)
        with CommandProcess(Launch(str(job.script), job.arguments, job.result_flag), merge=False) as process:
            for text in process.printed():
                sys.stderr.write(text)
                sys.stderr.flush()
        assert process.code is not None
        yield index, Ended(failure(process.code, process.output), time.monotonic() - started, process.result)


def outcomes_of(
    prepared: Sequence[Job | Outcome], run_jobs: Runner, finish: Callable[[int, Ended], Outcome]
) -> list[Outcome]:
    """Run the jobs in `prepared`. Returns an outcome for each entry of `prepared`, in the same order.

    Args:
        prepared: jobs to run, and outcomes of work that is done already or has failed already.
        run_jobs: runs the jobs.
        finish: makes the outcome of a job, from its index in `prepared` and its `Ended`.
    """
    outcomes = {index: each for index, each in enumerate(prepared) if not isinstance(each, Job)}
    indices = [index for index in range(len(prepared)) if index not in outcomes]
    for number, ended in run_jobs([each for each in prepared if isinstance(each, Job)]):
        outcomes[indices[number]] = finish(indices[number], ended)
    return [outcomes[index] for index in range(len(prepared))]
