"""How a batch is going: on a terminal a bar, with a line for every job that runs; else a line for every event.

In: what happens to jobs. Out: that, on standard output. What a failed job said goes to standard error.
"""

import sys

import rich.progress

_SHOWN_LINES = 30  # of a failed job's output


class Display:
    """A context; jobs are named in it by their index."""

    def __init__(self, names: list[str]):
        self._names = names
        self._done = 0
        self._rows: dict[int, rich.progress.TaskID] = {}
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[says]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            transient=True,
        )
        self._on_terminal = self._progress.console.is_terminal
        self._total = self._progress.add_task("All", total=len(names), says=f"0 of {len(names)}")

    def __enter__(self) -> "Display":
        if self._on_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_terminal:
            self._progress.stop()

    def started(self, index: int, host: str) -> None:
        if self._on_terminal:
            self._rows[index] = self._progress.add_task(f"{self._names[index]} on {host}", total=None, says="")
        else:
            self._line(f"{self._names[index]}: started on {host}")

    def says(self, index: int, line: str) -> None:
        """The last line the job printed; shown on a terminal only."""
        if index in self._rows:
            self._progress.update(self._rows[index], says=line[:60])

    def lost(self, index: int, host: str, again: int, most: int) -> None:
        """Its worker died; it goes to another for the `again`th time of at most `most`."""
        self._remove(index)
        self._line(f"{self._names[index]}: its worker on {host} was lost; goes to another ({again} of {most} retries)")

    def ended(self, index: int, seconds: float, reason: str, output: str) -> None:
        """It is done, or failed for `reason`."""
        self._remove(index)
        self._done += 1
        count = f"{self._done} of {len(self._names)}"
        self._progress.update(self._total, completed=self._done, says=count)
        self._line(f"[{count}] {self._names[index]}: {f'failed: {reason}' if reason else 'done'} ({seconds:.1f} s)")
        lines = output.replace("\r", "\n").rstrip().split("\n")[-_SHOWN_LINES:]
        if reason and output.strip():
            print("\n".join(f"  | {line}" for line in lines), file=sys.stderr, flush=True)

    def _remove(self, index: int) -> None:
        if index in self._rows:
            self._progress.remove_task(self._rows.pop(index))

    def _line(self, text: str) -> None:
        print(text, flush=True)  # above the bar: rich takes what is printed while it shows one
