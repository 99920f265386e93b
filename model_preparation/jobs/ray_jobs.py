"""Runs jobs as tasks of a Ray cluster: many at once, on this machine or on several.

Each task runs its command in a process of its own, which dies with the worker. A worker is lost if it was killed, or
its machine failed. Then another worker continues its job from the files on the disk. A command that fails is not
repeated.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from model_preparation.devices import OF_JOB
from model_preparation.jobs.jobs import Ended, Job
from model_preparation.jobs.process import Launch, Order, carry_out, failure
from model_preparation.jobs.ray_cluster import cluster, job_variables
from model_preparation.jobs.ray_gpus import gpus_per_job

_CANCEL_SECONDS = 20.0  # for running jobs to clean up after Ctrl-C
_LOST = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "LocalRayletDiedError", "ObjectLostError")
_SHOWN_LINES = 30  # of a failed job's output


@dataclass
class _Running:
    """A job that a worker runs, or that waits for a worker."""

    index: int
    submitted: float
    started: float | None = None
    retries: int = 0
    place: tuple[str, int] | None = None  # host and process id


@dataclass(frozen=True)
class RayRunner:
    """Runs jobs on a cluster, for `build_all`, `evaluate_all` and `distill_llamba_base`.

    Args:
        address: as `cluster` takes it.
        cpus_per_job: CPUs of each task, and its number of threads.
        device: as `gpus_per_job` takes it.
        max_retries: how often a job may go to another worker.

    Raises:
        SurgeryError: when the runner is called; for the same reasons as `cluster` and `gpus_per_job`.
    """

    address: str
    cpus_per_job: int = 1
    device: str | None = None
    max_retries: int = 3

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Ended]]:
        if not jobs:
            return
        with cluster(self.address) as ray:
            gpus = gpus_per_job(ray, self.device, self.cpus_per_job)
            task = ray.remote(carry_out).options(
                num_cpus=self.cpus_per_job,
                num_gpus=gpus,
                num_returns="streaming",
                max_retries=0,  # we retry instead of Ray: the new task waits for the old process, and the user sees it
            )
            with Display([job.name for job in jobs]) as display, _marker_files(jobs) as markers:
                orders = [_order(job, markers, with_gpu=gpus > 0) for job in jobs]
                yield from _watch(ray, task, orders, display, self.max_retries)


def _watch(
    ray: Any, task: Any, orders: Sequence[Order], display: "Display", max_retries: int
) -> Iterator[tuple[int, Ended]]:
    """Submit the orders, and handle their events. When a job ends, yields its index and its `Ended`."""
    lost = tuple(getattr(ray.exceptions, name) for name in _LOST)
    running = {task.remote(order): _Running(index, time.monotonic()) for index, order in enumerate(orders)}

    def ended(job: _Running, reason: str, output: str = "", result: dict[str, Any] | None = None) -> tuple[int, Ended]:
        seconds = time.monotonic() - (job.started or job.submitted)
        display.ended(job.index, seconds, reason, output)
        return job.index, Ended(reason, seconds, result)

    try:
        while running:
            # The wait ends after a second at the latest, so that Python can handle a signal.
            for events in ray.wait(list(running), num_returns=1, timeout=1)[0]:
                job = running[events]
                try:
                    kind, *event = ray.get(next(events))
                except lost as error:
                    del running[events]
                    host = job.place[0] if job.place else "a machine"
                    if job.retries < max_retries:
                        job.retries += 1
                        display.lost(job.index, host, job.retries, max_retries)
                        running[task.remote(orders[job.index]._replace(predecessor=job.place))] = job
                        continue
                    lost_times, cause = job.retries + 1, type(error).__name__
                    yield ended(job, f"its worker was lost {lost_times} times, last on {host} ({cause})")
                    continue
                if kind == "started":
                    job.place, job.started = (event[0], event[1]), job.started or time.monotonic()
                    display.started(job.index, event[0])
                elif kind == "line":
                    display.show_line(job.index, event[0])
                elif kind == "ended":
                    del running[events]
                    code, output, result = event
                    yield ended(job, failure(code, output), output, result)
                else:
                    del running[events]
                    yield ended(
                        job,
                        f"the worker on {event[0]} does not see {event[1]}. Every machine of the cluster needs the "
                        "same folders at the same paths: put them on a shared file system.",
                    )
    finally:
        _cancel(ray, list(running))


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """End jobs, and give them time to clean up. Jobs that take longer die when we leave the cluster."""
    for events in tasks:
        ray.cancel(events)
    deadline = time.monotonic() + _CANCEL_SECONDS
    for events in tasks:
        with contextlib.suppress(ray.exceptions.RayError, StopIteration):
            while time.monotonic() < deadline:
                if ray.wait([events], timeout=0.5)[0]:
                    ray.get(next(events))


@contextlib.contextmanager
def _marker_files(jobs: Sequence[Job]) -> Iterator[dict[Path, str]]:
    """Make a file in each folder that jobs write to. A worker that does not see the file has another folder there."""
    with contextlib.ExitStack() as stack:
        markers = {}
        for folder in {job.writes_to for job in jobs if job.writes_to is not None}:
            folder.mkdir(parents=True, exist_ok=True)
            marker = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".shared-by-ray-", dir=folder))
            markers[folder] = os.path.abspath(marker.name)
        yield markers


def _order(job: Job, markers: dict[Path, str], *, with_gpu: bool) -> Order:
    variables = {**job_variables(), OF_JOB: "cuda" if with_gpu else "cpu"}
    launch = Launch(str(job.script), job.arguments, job.result_flag, os.getcwd(), variables)
    needs = [os.getcwd(), str(job.script), launch.bootstrap, *(os.path.abspath(path) for path in job.needs)]
    needs += [markers[job.writes_to]] if job.writes_to is not None else []
    return Order(launch, tuple(needs), with_gpu)


class Display:
    """Shows the progress of jobs: on a terminal a bar and a line per running job, otherwise a line per event.

    Progress goes to standard output, the output of a failed job to standard error. Methods take the job's index.
    """

    def __init__(self, names: list[str]):
        self._names = names
        self._done = 0
        self._rows: dict[int, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[line]}", markup=False),
            TimeElapsedColumn(),
            transient=True,
        )
        self._progress.disable = not self._progress.console.is_terminal
        self._total = self._progress.add_task("All", total=len(names), line=f"0 of {len(names)}")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, index: int, host: str) -> None:
        if self._progress.disable:
            self._print(f"{self._names[index]}: started on {host}")
        else:
            self._rows[index] = self._progress.add_task(f"{self._names[index]} on {host}", total=None, line="")

    def show_line(self, index: int, line: str) -> None:
        """Show the last line that the job printed, on a terminal only."""
        if index in self._rows:
            self._progress.update(self._rows[index], line=line[:60])

    def lost(self, index: int, host: str, retry: int, max_retries: int) -> None:
        """Say that the job's worker was lost, and the number of the retry."""
        self._remove(index)
        self._print(
            f"{self._names[index]}: its worker on {host} was lost; another continues ({retry} of {max_retries} retries)"
        )

    def ended(self, index: int, seconds: float, reason: str, output: str) -> None:
        """Say that the job is done, or that it failed for `reason`."""
        self._remove(index)
        self._done += 1
        count = f"{self._done} of {len(self._names)}"
        self._progress.update(self._total, completed=self._done, line=count)
        self._print(f"[{count}] {self._names[index]}: {f'failed: {reason}' if reason else 'done'} ({seconds:.1f} s)")
        lines = output.replace("\r", "\n").rstrip().split("\n")[-_SHOWN_LINES:]
        if reason and output.strip():
            print("\n".join(f"  | {line}" for line in lines), file=sys.stderr, flush=True)

    def _remove(self, index: int) -> None:
        if index in self._rows:
            self._progress.remove_task(self._rows.pop(index))

    def _print(self, text: str) -> None:
        print(text, flush=True)  # rich shows it above the bar
