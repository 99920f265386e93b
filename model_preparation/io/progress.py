"""The bar that shows how far a long piece of work is."""

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
    """On a terminal, a bar for more than one step; it ends where the work ends or fails. Gives what advances it."""
    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    is_shown = rich.get_console().is_terminal and total > 1
    with Progress(*columns, transient=True, disable=not is_shown) as progress:
        task = progress.add_task(escaped(title), total=total)
        yield lambda count: progress.advance(task, count)
