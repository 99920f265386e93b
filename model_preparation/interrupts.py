"""Remembers Ctrl-C and SIGTERM, because Python drops an exception that a signal raises inside a `__del__`.

A command calls `watch` once. Code that makes a result final calls `check` first. A command that normally ends by Ctrl-C
calls `forget`.
"""

import signal
import sys

_received: list[int] = []


def watch() -> None:
    """Make SIGINT raise KeyboardInterrupt and SIGTERM SystemExit(143), and remember that they came."""

    def remember_and_stop(number: int, _frame) -> None:
        _received.append(number)
        _stop(number)

    def hide_dropped(unraisable) -> None:
        if not (_received and isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit)):
            sys.__unraisablehook__(unraisable)

    signal.signal(signal.SIGINT, remember_and_stop)
    signal.signal(signal.SIGTERM, remember_and_stop)
    sys.unraisablehook = hide_dropped  # `check` raises them again


def check() -> None:
    """Raise a signal's exception again, if it was lost."""
    if _received:
        _stop(_received[0])


def forget() -> None:
    """Forget the signals that came: the command ends as it does without them."""
    _received.clear()


def _stop(number: int) -> None:
    if number == signal.SIGTERM:
        sys.exit(143)
    raise KeyboardInterrupt
