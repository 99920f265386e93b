"""How a distillation is going: a bar over all steps of all layers, and a line for each layer that is done."""

from collections.abc import Mapping
from typing import Any

import rich.progress

from model_preparation.train.distill.distill_layer import Step


class LayerProgress:
    """A context, told by `train_layers` what it does.

    Args:
        total_steps: of all layers.
        done_steps: of those that were finished before.
    """

    def __init__(self, total_steps: int, done_steps: int = 0):
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
            transient=True,
        )
        self._bar = self._progress.add_task("Distilling", total=total_steps, completed=done_steps)

    def __enter__(self) -> "LayerProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def passing(self, index: int) -> None:
        """The hidden states go through a layer."""
        self._progress.update(self._bar, description=f"Hidden states through layer {index}")

    def step(self, index: int, step: Step) -> None:
        """A step of a layer's training is done."""
        self._progress.update(self._bar, advance=1, description=f"Layer {index}, loss {step.loss:.3f}")

    def finished(self, record: Mapping[str, Any]) -> None:
        """A layer is kept."""
        print(
            f"Layer {record['layer']}: error / variance on held-out tokens {record['initial']:.3f} -> "
            f"{record['final']:.3f} ({record['seconds']:.0f} s)"
            f"{', larger than before the training' if record['final'] > record['initial'] else ''}",
            flush=True,
        )
