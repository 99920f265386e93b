"""Work done beside other work, which one failure stops."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_TURN_SECONDS = 0.001


class BackgroundTasks:
    """A context in which calls run in threads of their own; leaving it waits for them, or stops them if it fails.

    Threads take turns more often meanwhile: beside an import, one that copies blocks would wait 5 ms before each.

    Args:
        at_once: how many run at the same time; those started last wait.
    """

    def __init__(self, at_once: int | None = None) -> None:
        self._executor = ThreadPoolExecutor(at_once, "beside")
        self._started: list[Future] = []
        self._stopped = threading.Event()
        self._turn_seconds = sys.getswitchinterval()

    def start(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `call` in a thread."""
        self._started.append(self._executor.submit(call, *args, **kwargs))
        return self._started[-1]

    def check(self) -> None:
        """To be called by long calls now and then: ends them, by an exception, when nobody wants the result."""
        if self._stopped.is_set():
            raise InterruptedError("stopped, as other work failed")

    def raise_failure(self) -> None:
        """Raise what a call that has ended raised, if one did."""
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
