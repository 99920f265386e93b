"""The progress bar of work that is counted in bytes."""

import rich.progress


def byte_progress() -> rich.progress.Progress:
    """A bar over bytes that goes when it is done."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        transient=True,
    )
