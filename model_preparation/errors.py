"""The one exception for a user's mistake or a broken input.

Its message has two short sentences: the fault, with the value seen and the value needed; and what to run or change.
Commands print it as one line and exit with 1. Any other exception is a bug and keeps its traceback.
"""


class SurgeryError(Exception):
    """A problem that the user can solve: a missing file, a wrong shape, a full disk, an unreachable hub."""


def one_line(error: object) -> str:
    """An error's message as a part of a sentence: one line, cut, without its full stop; without a message, its type."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
