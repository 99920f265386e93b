"""Texts of several models after the same prompts, beside each other: columns in a terminal, lines elsewhere.

In: per model its texts, and remarks on them. Out: printed.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from model_preparation.evaluation.generation import Generation
from model_preparation.terminal import escaped

LABEL = 12  # width of the first column where lines are printed


@dataclass
class Column:
    """One model: per prompt its texts, and remarks to print below them."""

    name: str
    texts: list[list[str]]
    remarks: list[list[str]] = field(default_factory=list)

    def cells(self, prompt: int, count: int) -> Iterator[tuple[str, str]]:
        """`count` texts after a prompt, each with its remark, "" where there is none."""
        remarks = self.remarks[prompt] if self.remarks else []
        pairs = itertools.zip_longest(self.texts[prompt], remarks, fillvalue="")
        return itertools.islice(itertools.chain(pairs, itertools.repeat(("", ""))), count)


def difference(own: Generation, other: Generation, same_tokenizer: bool) -> str:
    """Where the other model's greedy text leaves ours, counted from 1; in characters if the tokenizers differ."""
    if same_tokenizer:
        place = _first_difference(own.new_ids, other.new_ids)
        return f"the same {own.new_tokens} tokens" if place is None else f"first differing token: {place}"
    place = _first_difference(own.text, other.text)
    return "other tokenizer; " + ("the same text" if place is None else f"first differing character: {place}")


def print_side_by_side(prompts: Sequence[str], columns: Sequence[Column], console: Console | None = None) -> None:
    """Print every prompt with what the models wrote after it."""
    console = console or Console()
    for index, prompt in enumerate(prompts):
        count = max(len(column.texts[index]) for column in columns)
        rows = list(zip(*(column.cells(index, count) for column in columns), strict=True))
        print_prompt = _print_columns if console.is_terminal else _print_lines
        print_prompt(prompt, [escaped(column.name) for column in columns], rows, console)


def _print_columns(prompt: str, names: list[str], rows: list[tuple[tuple[str, str], ...]], console: Console) -> None:
    table = Table(title=Text(printable(prompt)), title_justify="left", show_lines=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    for row in rows:
        # As Text, so that brackets in what a model wrote are no markup.
        table.add_row(*(Text(printable(text.strip())).append(f"\n{remark}", "dim") for text, remark in row))
    console.print()
    console.print(table)


def _print_lines(prompt: str, names: list[str], rows: list[tuple[tuple[str, str], ...]], console: Console) -> None:
    print("\n" + _lines("Side by side", prompt), file=console.file)
    for row in rows:
        for name, (text, remark) in zip(names, row, strict=True):
            if text or remark:
                print(_lines(name, text.strip()), file=console.file)
            if remark:
                print(_lines("", f"({remark})"), file=console.file)


def _lines(label: str, text: str) -> str:
    """The text beside its label, its further lines below each other."""
    return f"{label:<{LABEL}} " + printable(text).replace("\n", "\n" + " " * (LABEL + 1))


def printable(text: str) -> str:
    """The text with control characters spelled out: a broken model's must not steer the terminal."""
    return escaped(text, "\n\t")


def _first_difference(one: Sequence, other: Sequence) -> int | None:
    for place, (a, b) in enumerate(itertools.zip_longest(one, other), start=1):
        if a != b:
            return place
    return None
