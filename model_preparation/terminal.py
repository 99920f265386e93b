"""What is shown of texts that strangers wrote: names in their files, what their models write, errors that quote them.

In: text. Out: the same with every character spelled out that would steer a terminal (escape sequences, line ends, a
change of direction) or that nobody sees. `Escaping` does that to all that is printed, whoever prints it.
"""

import re
from typing import Any, TextIO

# Control characters, changes of direction, line separators, zero-width ones (but those that scripts and emoji join by).
STEERING = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_OF_A_BAR = re.compile(r"\r|(\n|\x1b\[A)*\Z")  # tqdm's: to the line's start before it is drawn, to another line


def escaped(text: str, kept: str = "") -> str:
    """The text with such characters as Python writes them (`\\x1b`), but for those `kept`."""
    return STEERING.sub(
        lambda match: match[0] if match[0] in kept else match[0].encode("unicode_escape").decode(), text
    )


class Escaping:
    """A stream to print to in the place of `stream`: line ends and tabs stay, all else that steers is spelled out.

    rich writes past it: it makes escape sequences of its own, and is only given texts that are escaped.
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
