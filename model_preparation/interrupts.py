"""Remembers Ctrl-C and SIGTERM, because Python drops an exception that a signal raises inside a `__del__`.

A command calls `watch` once. Code that makes a result final calls `check` first. A command for which Ctrl-C is the
normal end calls `forget`.
"""

import signal
import sys

_received: list[int] = []


def watch() -> None:
    """Let SIGINT raise KeyboardInterrupt, let SIGTERM raise SystemExit(143), and remember each signal."""

    def remember_and_stop(number: int, _frame) -> None:
        _received.append(number)
        _stop(number)

    def hide_dropped(unraisable) -> None:
        if not (_received and isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit)):
            sys.__unraisablehook__(unraisable)

    signal.signal(signal.SIGINT, remember_and_stop)
    signal.signal(signal.SIGTERM, remember_and_stop)
    sys.unraisablehook = hide_dropped  # print nothing about a dropped exception: `check` raises it again


def check() -> None:
    """Raise the exception of the first signal, if a signal came and Python dropped its exception."""
    if _received:
        _stop(_received[0])


def forget() -> None:
    """Forget the signals that came, so that the command ends as if none had come."""
    _received.clear()


def _stop(number: int) -> None:
    if number == signal.SIGTERM:
        sys.exit(143)
    raise KeyboardInterrupt
