"""How a search is going: on a terminal a line that is redrawn, in a log a line now and then.

In: what happens. Out: evaluations done, layer passes saved, the best so far, the time that is left.
"""

import contextlib
import time
from collections.abc import Iterator

import rich
import rich.progress

from model_preparation.search.layer_sets import LayerSet
from model_preparation.terminal import escaped

_LOG_SECONDS = 10.0  # between two lines of a log


class SearchProgress:
    """A context; outside of it nothing is shown."""

    def __init__(self) -> None:
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn(
                "{task.completed:.0f}/{task.total:.0f} evaluations{task.fields[says]}", markup=False
            ),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            transient=True,
            disable=not rich.get_console().is_terminal,
        )
        self._row = self._progress.add_task("Searching", total=1, says="")
        self._told_at = time.monotonic()

    def __enter__(self) -> "SearchProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, evaluations: int) -> None:
        """So many there will be, as far as is known."""
        self._progress.update(self._row, total=evaluations)

    @contextlib.contextmanager
    def running_the_base(self) -> Iterator[None]:
        """Around the base's own run."""
        self._progress.update(self._row, description="Running the base")
        yield
        self._progress.update(self._row, description="Searching")

    def evaluated(self, done: int, saved: float, best: tuple[LayerSet, float] | None) -> None:
        """So many combinations are known; the share of layer passes saved, and the best of all with its fitness."""
        says = f", {saved:.0%} of the layer passes saved"
        if best is not None:
            says += f", best {best[1]:.4f} ({names(best[0])})"
        if not self._progress.disable:
            self._progress.update(self._row, completed=done, says=says)
        elif time.monotonic() - self._told_at > _LOG_SECONDS:
            self._told_at = time.monotonic()
            total = self._progress.tasks[0].total or done
            print(f"{done}/{total:.0f} evaluations{says}", flush=True)

    def failed(self, layers: LayerSet, reason: str) -> None:
        """An evaluation failed for good."""
        self._progress.console.print(f"{names(layers)}: failed: {escaped(reason)}", highlight=False, markup=False)


def names(layers: LayerSet) -> str:
    """The layers as people write them."""
    return " ".join(map(str, layers)) if layers else "base"
