"""What a Ray worker does: see whether it can do a job, run its command, and tell how that goes.

In: an `Order`. Out: events, tuples that begin with "started", "says" or "ended". Sent to the workers by value together
with process.py: they need Ray and what the command needs, at the same paths; this package need not be importable.
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from model_preparation.jobs.process import Launch, Output, chunks, end, read_result, start

SAYS_SECONDS = 1.0  # between two lines of output that are told
GONE_SECONDS = 120.0  # for the process of a worker that was lost to be gone


class Order(NamedTuple):
    """A job for a worker: `predecessor` is (host, process) of the same job on a worker that was lost."""

    launch: Launch
    needs: tuple[str, ...]
    result_flag: str | None
    with_gpu: bool
    predecessor: tuple[str, int] | None = None


def carry_out(order: Order) -> Iterator[tuple[Any, ...]]:
    """Run an order, and tell: ("started", host, process), ("says", line), and at last ("ended", code, output, result).

    Where a path is missing it runs nothing; there is one event then, ("blind", host, path).
    """
    host = socket.gethostname()
    for path in order.needs:
        if not os.path.exists(path):
            yield "blind", host, path
            return
    if order.predecessor is not None and order.predecessor[0] == host:
        _wait_until_gone(order.predecessor[1])
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        launch = order.launch
        if order.result_flag:
            launch = launch._replace(arguments=(*launch.arguments, order.result_flag, str(result_file)))
        if not order.with_gpu:
            launch = launch._replace(variables={**launch.variables, "CUDA_VISIBLE_DEVICES": ""})
        process = start(launch, merge=True)
        try:
            yield "started", host, process.pid
            output, told, told_at = Output(), "", 0.0
            for chunk in chunks(process):
                output.add(chunk)
                if time.monotonic() - told_at >= SAYS_SECONDS and (line := output.last_line()) != told:
                    told, told_at = line, time.monotonic()
                    yield "says", line
        finally:
            end(process)
        yield "ended", process.returncode, output.text, read_result(result_file)


def _wait_until_gone(process_id: int) -> None:
    """Wait for the end of a process that was killed: what it held, a lock or memory, is free then."""
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            return  # the number is another user's process by now
        time.sleep(0.1)
