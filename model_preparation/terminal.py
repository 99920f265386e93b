"""Makes strangers' texts safe to print: names in their files, their models' output, errors that quote them.

Characters that control a terminal (escape sequences, line ends, changes of direction) or are invisible are printed as
escapes, such as `\\x1b`. `Escaping` does so for everything that is printed.
"""

import re
from typing import Any, TextIO

# Control characters, changes of direction, line separators, zero-width characters (except those that join letters).
STEERING = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_BAR_MOVES = re.compile(r"\r|(\n|\x1b\[A)*\Z")  # tqdm's moves: to the line's start before a bar, or to another line


def escaped(text: str, kept: str = "") -> str:
    """The text with these characters as Python's escapes (`\\x1b`), except those in `kept`."""
    return STEERING.sub(
        lambda match: match[0] if match[0] in kept else match[0].encode("unicode_escape").decode(), text
    )


class Escaping:
    """Replaces `stream`: line ends and tabs stay, other control characters are escaped.

    rich bypasses it, because rich writes its own escape sequences; rich gets only escaped texts.
    """

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # the name by which rich asks for it

    def write(self, text: str) -> int:
        start = match.end() if (match := _BAR_MOVES.match(text)) else 0
        self.rich_proxied_file.write(text[:start] + escaped(text[start:], "\n\t"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)
