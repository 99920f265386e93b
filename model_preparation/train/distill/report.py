"""The report of a distillation, in the model's folder: distillation.jsonl (losses), .png (plot), .json (summary)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from model_preparation.checkpoint.checkpoint_folder import write_json
from model_preparation.jobs.table import table

LOG, PLOT, SUMMARY = "distillation.jsonl", "distillation.png", "distillation.json"


def write_report(folder: Path, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Write the three files. `records` are the records from the work folder, one for each layer, in order."""
    lines = [json.dumps({"layer": record["layer"], **step}) for record in records for step in record["log"]]
    (folder / LOG).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    plot_losses(records).savefig(folder / PLOT, dpi=150)
    write_json(folder / SUMMARY, summary)


def describe(summary: Mapping[str, Any]) -> str:
    """The summary as a table with a row per layer, and the perplexities."""
    rows = [(str(row["layer"]), f"{row['initial']:.4f}", f"{row['final']:.4f}") for row in summary["layers"]]
    perplexity = ", ".join(f"{name} {value:.4g}" for name, value in summary["perplexity"].items())
    worse = ", ".join(str(row["layer"]) for row in summary["layers"] if row["final"] > row["initial"])
    note = f"Note: the training made the error larger in layer {worse}. Give a lower --learning_rate, or more --tokens."
    return (
        f"{table(('layer', 'initial', 'distilled'), rows)}\n"
        f"({summary['loss']})\n"
        f"Perplexity on {summary['tokens']['held_out']:,} held-out tokens: {perplexity}"
        f"{f'{chr(10)}{note}' if worse else ''}"
    )


def plot_losses(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Two plots. Left: each layer's loss over the steps. Right: its error on held-out text, before and after."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_steps, by_layer = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis"]
    indices = [record["layer"] for record in records]
    norm = matplotlib.colors.Normalize(min(indices), max(max(indices), min(indices) + 1))
    for record in records:
        steps, losses = zip(*((step["step"], step["loss"]) for step in record["log"]), strict=True)
        over_steps.plot(steps, losses, color=colours(norm(record["layer"])), linewidth=0.8)
    figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, colours), ax=over_steps, label="layer", ticks=MaxNLocator(integer=True)
    )
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_steps.set(yscale="log", xlabel="step", ylabel="error / variance of the donor's output", title="Training")
    by_layer.plot(indices, [record["initial"] for record in records], "o-", markersize=3, label="initial")
    by_layer.plot(indices, [record["final"] for record in records], "o-", markersize=3, label="distilled")
    by_layer.set(yscale="log", xlabel="layer", ylabel="error / variance of the donor's output", title="Held-out text")
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_layer.legend()
    for axes in (over_steps, by_layer):
        axes.grid(linewidth=0.4, alpha=0.4)
    return figure
