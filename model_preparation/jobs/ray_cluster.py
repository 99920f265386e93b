"""Starts or joins a Ray cluster. The only file that imports Ray."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any

from model_preparation import interrupts
from model_preparation.errors import SurgeryError
from model_preparation.hub.download import first_line
from model_preparation.jobs import process

_CONNECT_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100_000_000  # of our own cluster; nothing large goes through it
# Prefixes of the environment variables that jobs need: paths of models and questions, tokens, Python's module path.
_VARIABLES = ("MODEL_PREPARATION_", "MODELSCOPE_", "HF_", "MMLU_DATA", "SOURCE_DATE_EPOCH", "PYTHONPATH")


@contextlib.contextmanager
def cluster(address: str, local_cpus: int | None = None) -> Iterator[Any]:
    """Join a cluster for the length of a `with` block; yields the module `ray`.

    Args:
        address: "local" starts a cluster that only this machine can reach, and ends it after the block. "auto" joins
            the cluster that runs on this machine. HOST:PORT joins that cluster; this machine must belong to it.
        local_cpus: how many CPUs a "local" cluster has; by default all.

    Raises:
        SurgeryError: if Ray cannot be imported, `address` is not valid, or no cluster starts or answers.
    """
    _check_address(address)
    ray = _import_ray(address)
    quiet = {"log_to_driver": False, "logging_level": "error"}
    own: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": _LOOPBACK}
    own |= {"object_store_memory": _OBJECT_STORE_BYTES, "num_cpus": local_cpus}
    try:
        ray.init(address=address, **quiet, **(own if address == "local" else {}))
    except Exception as error:  # Ray raises many classes, and a plain Exception if it starts too slowly
        if _wants_token(ray, error):
            raise SurgeryError(
                f"The Ray cluster at {address} wants its token. Set RAY_AUTH_MODE=token, and put the token into "
                "~/.ray/auth_token or RAY_AUTH_TOKEN, as on the machine that started the cluster."
            ) from error
        if address == "local":
            raise SurgeryError(
                f"No Ray cluster could be started ({first_line(error)}). Try again, or leave --ray out."
            ) from error
        raise SurgeryError(
            f"No Ray cluster could be joined at {address} ({first_line(error)}). Use --ray local, or start one on this "
            "machine: ray start --head"
        ) from error
    if address == "local" and (listens := ray.util.get_node_ip_address()) != _LOOPBACK:
        print(f"Ray was imported earlier, so it listens on {listens} and all other addresses of this machine.")
    interrupts.watch()  # Ray has replaced our signal handler
    try:
        yield ray
    except SystemExit:
        interrupts.check()  # raises the right exit code: Ray turns a signal during its calls into exit code 1
        raise
    finally:
        ray.shutdown()


def _import_ray(address: str) -> Any:
    if address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # so Ray listens on the loopback only
        if "RAY_AUTH_MODE" not in os.environ:  # other users of this machine must not submit work
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; without it Ray warns
    try:
        import ray
    except ImportError as error:
        raise SurgeryError(
            f"--ray needs Ray, which cannot be imported ({error}). "
            "Install it (pip install 'ray>=2.50,<3'), or leave --ray out to run one after the other."
        ) from error
    ray.cloudpickle.register_pickle_by_value(process)
    return ray


def _wants_token(ray: Any, error: BaseException | None) -> bool:
    """Whether a missing or wrong token caused Ray's error."""
    # Sometimes only the text of Ray's error names the token.
    return error is not None and (
        isinstance(error, ray.exceptions.AuthenticationError)
        or "InvalidAuthToken" in str(error)
        or _wants_token(ray, error.__cause__)
    )


def _check_address(address: str) -> None:
    """Raise SurgeryError within seconds if nothing answers at HOST:PORT, or if the address is not valid."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise SurgeryError(
            f"--ray {address} is none of auto, local and HOST:PORT. Give the address that ray start --head printed, "
            "on a machine of the cluster."
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise SurgeryError(
            f"Nothing answers at --ray {address} ({first_line(error)}). "
            "Give the address that ray start --head printed, or use --ray local."
        ) from error


def job_variables() -> dict[str, str]:
    """The environment variables that jobs need."""
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
