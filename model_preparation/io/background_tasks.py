"""Runs calls in background threads; if one call fails, the others stop."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_TURN_SECONDS = 0.001


class BackgroundTasks:
    """A context that runs calls in threads. At its end it waits for all calls; after an exception it stops them.

    Inside it, Python switches between threads more often. Otherwise a thread that copies blocks would wait 5 ms
    for each block while another thread imports modules.

    Args:
        at_once: how many calls run at the same time; further calls wait.
    """

    def __init__(self, at_once: int | None = None) -> None:
        self._executor = ThreadPoolExecutor(at_once, "background")
        self._started: list[Future] = []
        self._stopped = threading.Event()
        self._turn_seconds = sys.getswitchinterval()

    def start(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `call` in a thread."""
        self._started.append(self._executor.submit(call, *args, **kwargs))
        return self._started[-1]

    def check(self) -> None:
        """Long work calls this from time to time. It raises the error of a failed call, so the caller stops too."""
        if self._stopped.is_set():
            raise InterruptedError("stopped, because other work failed")
        for future in self._started:
            if future.done():
                future.result()

    def __enter__(self) -> "BackgroundTasks":
        sys.setswitchinterval(_TURN_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
        if kind is not None:
            self._stopped.set()
        self._executor.shutdown(cancel_futures=kind is not None)
        sys.setswitchinterval(self._turn_seconds)
