"""The progress bar of long work."""

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
    """Show a bar, on a terminal only, until the work ends or fails; gives the function that advances it."""
    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not rich.get_console().is_terminal) as progress:
        task = progress.add_task(escaped(title), total=total)
        yield lambda count: progress.advance(task, count)
