"""Makes texts from strangers safe to print: names in their files, output of their models, errors that quote them.

A character that controls a terminal (escape sequence, line end, change of the writing direction) or is invisible is
printed as an escape, such as `\\x1b`. `Escaping` does this for everything that a command prints.
"""

import re
from typing import Any, TextIO

# Control characters, changes of the writing direction, line separators, zero-width characters except letter joiners.
STEERING = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_BAR_MOVES = re.compile(r"\r|(\n|\x1b\[A)*\Z")  # tqdm's moves: to the line's start before a bar, or to another line


def escaped(text: str, kept: str = "") -> str:
    """The text with each such character as Python's escape (`\\x1b`). Characters in `kept` stay."""
    return STEERING.sub(
        lambda match: match[0] if match[0] in kept else match[0].encode("unicode_escape").decode(), text
    )


class Escaping:
    """A stream that writes to `stream`. Line ends and tabs stay, and other control characters are escaped.

    rich writes its own escape sequences, so it bypasses this stream. rich gets only texts that are already escaped.
    """

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # rich looks for the real stream under this name

    def write(self, text: str) -> int:
        start = match.end() if (match := _BAR_MOVES.match(text)) else 0
        self.rich_proxied_file.write(text[:start] + escaped(text[start:], "\n\t"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)
