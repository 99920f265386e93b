"""Rows in aligned columns, as text that can be read, searched and pasted."""

from collections.abc import Sequence


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line for the heading and for each row, without the columns that are empty in every row."""
    used = [any(row[column] for row in rows) for column in range(len(heading))]
    lines = [[cell for cell, wanted in zip(row, used, strict=True) if wanted] for row in [heading, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
