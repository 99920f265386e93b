"""Strangers' texts made safe to print: names in their files, their models' output, errors that quote them.

Characters that steer a terminal (escape sequences, line ends, changes of direction) or that nobody sees are spelled
out. `Escaping` does so for everything that is printed.
"""

import re
from typing import Any, TextIO

# Control characters, changes of direction, line separators, zero-width characters (except those that join letters).
STEERING = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_OF_A_BAR = re.compile(r"\r|(\n|\x1b\[A)*\Z")  # tqdm's: to the line's start before it is drawn, to another line


def escaped(text: str, kept: str = "") -> str:
    """The text with such characters as Python writes them (`\\x1b`), except those in `kept`."""
    return STEERING.sub(
        lambda match: match[0] if match[0] in kept else match[0].encode("unicode_escape").decode(), text
    )


class Escaping:
    """Takes the place of `stream`: line ends and tabs stay, other steering characters are spelled out.

    rich writes past it, as it makes escape sequences of its own; it only gets escaped texts.
    """

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # the name by which rich asks for it

    def write(self, text: str) -> int:
        start = match.end() if (match := _OF_A_BAR.match(text)) else 0
        self.rich_proxied_file.write(text[:start] + escaped(text[start:], "\n\t"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)
