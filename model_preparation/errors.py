"""The one exception for a user's mistake or a broken input.

Its message has two short sentences. The first says what is wrong, with the value seen and the value needed. The second
says what to run or change. Commands print the message as one line and exit with 1. They do the same for an
OSError and for a full GPU (command_line.py). Any other exception is a bug and keeps its traceback.
"""


class SurgeryError(Exception):
    """A problem that the user can solve: a missing file, a wrong shape, a full disk, an unreachable hub."""


def one_line(error: object) -> str:
    """An error's message, or else its type, for use in a sentence: one line, at most 300 characters, no full stop."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
