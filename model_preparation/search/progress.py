"""The progress of a search: on a terminal one line that is redrawn, in a log at most a line every ten seconds."""

import contextlib
import time
from collections.abc import Iterator

import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model_preparation.terminal import escaped

_LOG_SECONDS = 10.0  # between two lines of a log
_COUNT = "{task.completed:.0f}/{task.total:.0f} evaluations{task.fields[note]}"


class SearchProgress:
    """Shows how many combinations are evaluated. On a terminal, it does so inside its `with` block only."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn(_COUNT, markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            transient=True,
            disable=not rich.get_console().is_terminal,
        )
        self._row = self._progress.add_task("Searching", total=1, note="")
        self._logged_at = time.monotonic()

    def __enter__(self) -> "SearchProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def set_total(self, evaluations: int) -> None:
        """Set how many evaluations there will be, as far as known."""
        self._progress.update(self._row, total=evaluations)

    @contextlib.contextmanager
    def running_the_base(self) -> Iterator[None]:
        self._progress.update(self._row, description="Running the base")
        yield
        self._progress.update(self._row, description="Searching")

    def evaluated(self, done: int, saved: float, best: tuple[str, float] | None) -> None:
        """Show how many combinations are evaluated, how much was saved, and the best combination with its fitness.

        `saved` is the share of layer runs that were not needed: combinations share layers, and some are dropped early.
        """
        note = f", {saved:.0%} of the layer passes saved"
        if best is not None:
            note += f", best {best[1]:.4f} ({best[0]})"
        if not self._progress.disable:
            self._progress.update(self._row, completed=done, note=note)
        elif time.monotonic() - self._logged_at > _LOG_SECONDS:
            self._logged_at = time.monotonic()
            total = self._progress.tasks[0].total or done
            print(f"{done}/{total:.0f} evaluations{note}", flush=True)

    def failed(self, combination: str, reason: str) -> None:
        """Print that the evaluation of a combination failed, and why."""
        self._progress.console.print(f"{combination}: failed: {escaped(reason)}", highlight=False, markup=False)
