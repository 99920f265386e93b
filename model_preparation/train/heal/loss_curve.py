"""The course of a run as a picture: losses above, learning rate below."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_losses(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a log's `loss`, `eval_loss` and `learning_rate` over its `step` into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of imports, at the end only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, name, label in (
        (losses, "loss", "training loss"),
        (losses, "eval_loss", "held-out loss"),
        (rates, "learning_rate", "learning rate"),
    ):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if name == "eval_loss" else None, label=label)
            axes.legend()
    losses.set_ylabel("loss, nats per token")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    figure.savefig(path, format="png", metadata={"Software": None})
