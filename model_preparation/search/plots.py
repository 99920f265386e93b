"""A search as plots.

In: a search's result, as search_result.json has it, with `history` ((layers, fitness) in the order of evaluation).
Out: matplotlib figures, for comparison.plots to save as PNG or SVG.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from model_preparation.evaluation.compare.plots import COLOURS, INK, Plot

_WIDTH_INCHES = 7.2
_FITNESS = {"accuracy": "accuracy", "kl": "-KL to the donor (nats)"}


def plot_singles(found: dict[str, Any]) -> Figure:
    """A bar per layer: what it gains over the base by itself, with the standard error of its score."""
    figure, axes = _axes(3.2)
    singles = found["single_layer_results"]
    layers = sorted(map(int, singles))
    gains = [singles[str(layer)]["gain"] for layer in layers]
    errors = [singles[str(layer)]["stderr"] or 0.0 for layer in layers]
    axes.bar(layers, gains, yerr=errors, color=COLOURS[0], ecolor=INK, capsize=2)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("layer grafted")
    axes.set_ylabel(f"gain in {_FITNESS[found['objective']]}")
    return figure


def plot_pairs(found: dict[str, Any]) -> Figure:
    """A square per pair of layers, coloured by its fitness; on the diagonal the single layers. White is not known."""
    total = found["total_layers"]
    table = np.full((total, total), np.nan)
    for row in found["final_results"]:
        if row["num_layers"] <= 2:
            first, last = row["layers"][0], row["layers"][-1]
            table[first, last] = table[last, first] = row["fitness"]
    for layer, single in found["single_layer_results"].items():
        table[int(layer), int(layer)] = single["score"]
    figure, axes = _axes(5.8)
    image = axes.imshow(np.ma.masked_invalid(table), cmap="viridis", origin="lower")
    figure.colorbar(image, ax=axes, label=_FITNESS[found["objective"]])
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    return figure


def plot_history(found: dict[str, Any]) -> Figure:
    """The best fitness so far, over the evaluations."""
    figure, axes = _axes(3.2)
    fitness = [fitness for _, fitness in found["history"]]
    numbers = range(1, len(fitness) + 1)
    axes.plot(numbers, fitness, ".", color=COLOURS[5], markersize=3, label="each combination")
    axes.step(numbers, np.maximum.accumulate(fitness), where="post", color=COLOURS[0], label="best so far")
    axes.axhline(found["base_score"], color=COLOURS[1], linestyle="--", label="base")
    if found["donor_score"] is not None:
        axes.axhline(found["donor_score"], color=COLOURS[2], linestyle="--", label="donor")
    axes.set_xlabel("evaluations")
    axes.set_ylabel(_FITNESS[found["objective"]])
    axes.legend(frameon=False)
    return figure


def plot_pareto(found: dict[str, Any]) -> Figure:
    """Fitness against the K/V cache's bytes per token: all combinations, and the front of those none surpasses."""
    figure, axes = _axes(3.6)
    rows, front = found["final_results"], found["pareto"]
    axes.plot(
        [row["kv_bytes_per_token"] for row in rows],
        [row["fitness"] for row in rows],
        ".",
        color=COLOURS[5],
        markersize=3,
    )
    axes.errorbar(
        [row["kv_bytes_per_token"] for row in front],
        [row["fitness"] for row in front],
        yerr=[row["stderr"] or 0.0 for row in front],
        marker="o",
        color=COLOURS[0],
        capsize=2,
    )
    for row in front:
        label = " ".join(map(str, row["layers"])) or "base"
        place = (row["kv_bytes_per_token"], row["fitness"])
        axes.annotate(label, place, textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.margins(x=0.15)
    axes.set_xlabel("K/V cache, bytes per token")
    axes.set_ylabel(_FITNESS[found["objective"]])
    return figure


TITLES: dict[str, tuple[str, Plot]] = {
    "single_layers": ("What each layer gains by itself", plot_singles),
    "pairs": ("Pairs of layers", plot_pairs),
    "history": ("Best fitness over evaluations", plot_history),
    "pareto": ("Fitness against K/V cache", plot_pareto),
}


def _axes(height_inches: float):
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()
