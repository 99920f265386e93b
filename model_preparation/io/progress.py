"""A progress bar for long work."""

import contextlib
from collections.abc import Callable, Iterator

import rich
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from model_preparation.terminal import escaped


@contextlib.contextmanager
def bar(title: str, total: float, *, in_bytes: bool = False) -> Iterator[Callable[[float], None]]:
    """Show a bar while the block runs, if on a terminal and `total` > 1. Yields a function that advances the bar."""
    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    is_shown = rich.get_console().is_terminal and total > 1
    with Progress(*columns, transient=True, disable=not is_shown) as progress:
        task = progress.add_task(escaped(title), total=total)
        yield lambda count: progress.advance(task, count)
