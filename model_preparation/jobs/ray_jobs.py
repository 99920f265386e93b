"""Jobs as tasks of a Ray cluster: many at once, on this machine or on many. The only file that imports Ray.

In: jobs and where the cluster is. Out: as from `run_in_turn`, in the order in which they end. Each task runs its
command in a process of its own, which dies with the worker. A worker that is lost (killed, its machine gone) costs what
it had not written yet: the job goes to another worker, at most `max_retries` times. A command that fails is not tried
again.
"""

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation import interrupts
from model_preparation.devices import OF_JOB
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import first_line
from model_preparation.jobs import process, remote_job
from model_preparation.jobs.display import Display
from model_preparation.jobs.jobs import Ended, Job, failure
from model_preparation.jobs.process import Launch
from model_preparation.jobs.remote_job import Order, carry_out

_CONNECT_SECONDS = 5.0
_CANCEL_SECONDS = 20.0  # for what runs to clean up after Ctrl-C
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100_000_000  # of a cluster of our own; nothing large goes through it
# Variables of this shell that go with a job: where models and questions are, tokens, and where Python finds modules.
VARIABLES = ("MODEL_PREPARATION_", "MODELSCOPE_", "HF_", "MMLU_DATA", "SOURCE_DATE_EPOCH", "PYTHONPATH")


@dataclass
class _Running:
    """A job that is with a worker, or waits for one."""

    index: int
    submitted: float
    started: float | None = None
    retries: int = 0
    place: tuple[str, int] | None = None  # host and process


@dataclass(frozen=True)
class RayRunner:
    """What runs jobs on a cluster, for `build_all` and `evaluate_all`.

    Args:
        address: "local" starts a cluster on this machine, which no other can reach, and ends it; "auto" joins the one
            that runs here, else HOST:PORT of a cluster that this machine belongs to.
        cpus_per_job: of each task, also its number of threads.
        device: "cuda" for a GPU per task, "cpu" for none; by default a GPU if the cluster has any.
        max_retries: how often a job whose worker was lost goes to another one.

    Calling it raises:
        SurgeryError: if Ray is not installed, no cluster answers, or none of its machines is large enough for a job.
    """

    address: str
    cpus_per_job: int = 1
    device: str | None = None
    max_retries: int = 3

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Ended]]:
        if not jobs:
            return
        with cluster(self.address) as ray:
            gpus = gpus_per_job(ray, self.device)
            check_size(ray, self.cpus_per_job, gpus)
            task = ray.remote(carry_out).options(
                num_cpus=self.cpus_per_job,
                num_gpus=gpus,
                num_returns="streaming",
                max_retries=0,  # ours: the new task then waits for what is left of the old one, and the user is told
            )
            with Display([job.name for job in jobs]) as display, _marks(jobs) as marks:
                orders = [_order(job, marks, with_gpu=gpus > 0) for job in jobs]
                yield from _watch(ray, task, orders, display, self.max_retries)


def _watch(
    ray: Any, task: Any, orders: Sequence[Order], display: Display, max_retries: int
) -> Iterator[tuple[int, Ended]]:
    """Submit the orders, follow their events, and give how each ended."""
    lost = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.ObjectLostError,
    )
    running = {task.remote(order): _Running(index, time.monotonic()) for index, order in enumerate(orders)}
    try:
        while running:
            # Now and then it returns with nothing, for a signal to be seen.
            for events in ray.wait(list(running), num_returns=1, timeout=1)[0]:
                job = running[events]
                try:
                    event = ray.get(next(events))
                except lost as error:
                    del running[events]
                    host = job.place[0] if job.place else "a machine"
                    if job.retries < max_retries:
                        job.retries += 1
                        display.lost(job.index, host, job.retries, max_retries)
                        again = orders[job.index]._replace(predecessor=job.place)
                        running[task.remote(again)] = job
                        continue
                    reason = f"its worker was lost {job.retries + 1} times, last on {host} ({type(error).__name__})"
                    yield job.index, _ended(job, reason, "", None, display)
                    continue
                if event[0] == "started":
                    job.place, job.started = event[1:], job.started or time.monotonic()
                    display.started(job.index, event[1])
                elif event[0] == "says":
                    display.says(job.index, event[1])
                else:
                    del running[events]
                    yield job.index, _ended(job, _reason(event), *_printed(event), display)
    finally:
        _cancel(ray, list(running))


def _reason(event: tuple[Any, ...]) -> str:
    if event[0] == "ended":
        return failure(event[1], event[2])
    return (
        f"the worker on {event[1]} does not see {event[2]}. "
        "Every machine of the cluster needs the same folders at the same paths: put them on a shared file system."
    )


def _printed(event: tuple[Any, ...]) -> tuple[str, dict[str, Any] | None]:
    return (event[2], event[3]) if event[0] == "ended" else ("", None)


def _ended(job: _Running, reason: str, output: str, result: dict[str, Any] | None, display: Display) -> Ended:
    seconds = time.monotonic() - (job.started or job.submitted)
    display.ended(job.index, seconds, reason, output)
    return Ended(reason, seconds, result)


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """End what still runs, with time to clean up; what does not end dies with its worker, when we leave the cluster."""
    for events in tasks:
        ray.cancel(events)
    deadline = time.monotonic() + _CANCEL_SECONDS
    for events in tasks:
        with contextlib.suppress(ray.exceptions.RayError, StopIteration):
            while time.monotonic() < deadline:
                if ray.wait([events], timeout=0.5)[0]:
                    ray.get(next(events))


def _import_ray(address: str) -> Any:
    if address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # so that its own address is the loopback's
        if "RAY_AUTH_MODE" not in os.environ:  # nor may other users of this machine give it work
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what will be its default; else it warns
    try:
        import ray
    except ImportError as error:
        raise SurgeryError(
            f"--ray needs Ray, which cannot be imported ({error}). "
            "Install it (pip install 'ray>=2.50,<3'), or leave --ray out to run one after the other."
        ) from error
    for module in (process, remote_job):
        ray.cloudpickle.register_pickle_by_value(module)
    return ray


@contextlib.contextmanager
def cluster(address: str, local_cpus: int | None = None) -> Iterator[Any]:
    """Be part of a cluster, as `RayRunner` describes it; gives Ray. One that was started for us ends with the block.

    Raises:
        SurgeryError: if Ray is not installed, or no cluster answers.
    """
    _check_address(address)
    ray = _import_ray(address)
    quiet = {"log_to_driver": False, "logging_level": "error"}
    own: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": _LOOPBACK}
    own |= {"object_store_memory": _OBJECT_STORE_BYTES, "num_cpus": local_cpus}
    try:
        ray.init(address=address, **quiet, **(own if address == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if _wants_token(ray, error):
            raise SurgeryError(
                f"The Ray cluster at {address} wants its token. Set RAY_AUTH_MODE=token, and have the token in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN, as on the machine that started the cluster."
            ) from error
        raise SurgeryError(
            f"No Ray cluster could be {'started' if address == 'local' else f'joined at {address}'} "
            f"({first_line(error)}). Use --ray local, or start one on this machine: ray start --head"
        ) from error
    if address == "local" and (listens := ray.util.get_node_ip_address()) != _LOOPBACK:
        print(f"Ray, imported before, listens on {listens} and all other addresses of this machine.")
    interrupts.watch()  # Ray has put its own handler in the place of ours
    try:
        yield ray
    except SystemExit:
        interrupts.check()  # what a signal raises inside Ray's calls comes out of them as exit code 1
        raise
    finally:
        ray.shutdown()


def _wants_token(ray: Any, error: BaseException | None) -> bool:
    """Whether Ray's error comes from a token that is missing or wrong."""
    # It keeps the cause in the message only, in places.
    return error is not None and (
        isinstance(error, ray.exceptions.AuthenticationError)
        or "InvalidAuthToken" in str(error)
        or _wants_token(ray, error.__cause__)
    )


def _check_address(address: str) -> None:
    """Raise SurgeryError, within seconds, if `address` cannot be that of a cluster we may join."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise SurgeryError(
            f"--ray {address} is none of auto, local and HOST:PORT. Give the address that ray start --head printed, "
            "on a machine that is part of the cluster."
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise SurgeryError(
            f"Nothing answers at --ray {address} ({first_line(error)}). "
            "Give the address that ray start --head printed, or use --ray local."
        ) from error


def gpus_per_job(ray: Any, device: str | None) -> int:
    """1 if each job is to have a GPU, 0 if it runs on the CPU; prints which. `device` is as `RayRunner` has it.

    Raises:
        SurgeryError: if the cluster has no GPU, and one is asked for.
    """
    found = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not found:
        raise SurgeryError("--device cuda is given, and the Ray cluster has no GPU. Leave it out for the CPU.")
    gpus = 1 if found and device != "cpu" else 0
    note = "" if found else " (the Ray cluster has no GPU)"
    print(f"Device       {'a GPU from Ray' if gpus else 'the CPU'} for each job{note}", flush=True)
    return gpus


def check_size(ray: Any, cpus: int, gpus: int) -> None:
    """Raise SurgeryError if no machine could ever run a job."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        found = ", ".join(
            f"{machine.get('CPU', 0):.0f} CPUs and {machine.get('GPU', 0):.0f} GPUs" for machine in machines
        )
        raise SurgeryError(
            f"A job needs {cpus} CPUs and {gpus} GPUs of one machine, but the cluster's have {found}. "
            "Give a smaller --cpus_per_job, or another cluster."
        )


@contextlib.contextmanager
def _marks(jobs: Sequence[Job]) -> Iterator[dict[Path, str]]:
    """A file in each folder that jobs write to: a worker that does not see it would write into a folder of its own."""
    with contextlib.ExitStack() as stack:
        marks = {}
        for folder in {job.writes_to for job in jobs if job.writes_to is not None}:
            folder.mkdir(parents=True, exist_ok=True)
            mark = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".shared-by-ray-", dir=folder))
            marks[folder] = os.path.abspath(mark.name)
        yield marks


def _order(job: Job, marks: dict[Path, str], *, with_gpu: bool) -> Order:
    variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    variables[OF_JOB] = "cuda" if with_gpu else "cpu"
    launch = Launch(str(job.script), job.arguments, os.getcwd(), variables)
    needs = [os.getcwd(), str(job.script), launch.bootstrap, *(os.path.abspath(path) for path in job.needs)]
    needs += [marks[job.writes_to]] if job.writes_to is not None else []
    return Order(launch, tuple(needs), job.result_flag, with_gpu)
