"""The report of a search: report.html, which needs no other file, and its plots as PNG.

jinja2 escapes what comes from files. The page's security policy forbids all requests, and all scripts but its own.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from model_preparation.evaluation.compare import plots as drawing
from model_preparation.evaluation.compare.plots import COLOURS, INK, Plot
from model_preparation.evaluation.compare.report import render_page
from model_preparation.io.complete_file import write_file
from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.layer_sets import names_of
from model_preparation.search.result import COMPARED

PAGE = "report.html"
_WIDTH_INCHES = 7.2
_FITNESS = {"accuracy": "accuracy", "kl": "-KL to the donor (nats)", "nll": "-loss of the answer (nats per token)"}


def write_report(found: dict[str, Any], scores: CandidateScores, folder: Path) -> None:
    """Write report.html and the plots into `folder`, each file whole or not at all.

    Args:
        found: the content of search_result.json.
        scores: for the order in which combinations were evaluated.
        folder: where the files go.

    Raises:
        OSError: from the file system.
    """
    shown = {**found, "history": [(layers, scores.estimate(layers)) for layers in scores.order]}
    plots = []
    unit = "heads" if "heads_per_layer" in found else "layers"
    for name, (title, plot, units) in PLOTS.items():
        if unit in units:
            plots.append((title, drawing.save_both(plot, shown, name, folder)))
    page = render_page(
        resources.files(__package__).joinpath(PAGE).read_text(encoding="utf-8"),
        title=f"{unit.capitalize()} of {Path(found['base']).name}: {found['search']['method']} search",
        found=shown,
        unit=unit,
        names_of=names_of,
        compared=COMPARED,
        plots=plots,
    )
    write_file(folder / PAGE, page)


def plot_singles(found: dict[str, Any]) -> Figure:
    """A bar per layer: the gain over the base if only this layer is grafted, with the standard error of the score."""
    figure, axes = _axes(3.2, "layer grafted", f"gain in {_FITNESS[found['objective']]}")
    singles = found["single_layer_results"]
    layers = sorted(map(int, singles))
    gains = [singles[str(layer)]["gain"] for layer in layers]
    errors = [singles[str(layer)]["stderr"] or 0.0 for layer in layers]
    axes.bar(layers, gains, yerr=errors, color=COLOURS[0], ecolor=INK, capsize=2)
    _reference_lines(axes, found, found["base_score"])
    return figure


def plot_heads(found: dict[str, Any]) -> Figure:
    """A square per head, coloured by the gain over the base if only this head is grafted. The best set has rings."""
    total, heads = found["total_layers"], found["heads_per_layer"]
    table = np.full((total, heads), np.nan)
    for name, single in found["single_head_results"].items():
        table[*map(int, name.split(":"))] = single["gain"]
    figure, axes = _axes(1.6 + 0.22 * total, "head", "layer")
    most = np.nan_to_num(np.abs(table)).max() or 1.0
    image = axes.imshow(table, cmap="RdBu", vmin=-most, vmax=most, origin="lower", aspect="auto")
    figure.colorbar(image, ax=axes, label=f"gain in {_FITNESS[found['objective']]}")
    best = np.array([list(map(int, name.split(":"))) for name in found["final_results"][0]["heads"]])
    axes.scatter(
        best[:, 1], best[:, 0], s=60, facecolors="none", edgecolors=COLOURS[1], label="in the best combination"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    _reference_lines(axes, {**found, "base_score": None, "donor_score": None})
    return figure


def plot_pairs(found: dict[str, Any]) -> Figure:
    """A square per pair of layers, coloured by fitness. Single layers are on the diagonal. Unknown pairs are white."""
    total = found["total_layers"]
    table = np.full((total, total), np.nan)
    for row in found["final_results"]:
        if row["num_layers"] <= 2:
            first, last = row["layers"][0], row["layers"][-1]
            table[first, last] = table[last, first] = row["fitness"]
    for layer, single in found["single_layer_results"].items():
        table[int(layer), int(layer)] = single["score"]
    figure, axes = _axes(5.8, "layer", "layer")
    image = axes.imshow(np.ma.masked_invalid(table), cmap="viridis", origin="lower")
    figure.colorbar(image, ax=axes, label=_FITNESS[found["objective"]])
    return figure


def plot_history(found: dict[str, Any]) -> Figure:
    """The best fitness so far, over the evaluations."""
    figure, axes = _axes(3.2, "evaluations", _FITNESS[found["objective"]])
    fitness = [fitness for _, fitness in found["history"]]
    numbers = range(1, len(fitness) + 1)
    axes.plot(numbers, fitness, ".", color=COLOURS[5], markersize=3, label="each combination")
    axes.step(numbers, np.maximum.accumulate(fitness), where="post", color=COLOURS[0], label="best so far")
    _reference_lines(axes, found)
    return figure


def plot_pareto(found: dict[str, Any]) -> Figure:
    """Fitness against the K/V cache's bytes per token, of all combinations and of the Pareto front."""
    figure, axes = _axes(3.6, "K/V cache, bytes per token", _FITNESS[found["objective"]])
    (all_bytes, all_fitness), (front_bytes, front_fitness) = (
        [[row[name] for row in found[rows]] for name in ("kv_bytes_per_token", "fitness")]
        for rows in ("final_results", "pareto")
    )
    axes.plot(all_bytes, all_fitness, ".", color=COLOURS[5], markersize=3)
    errors = [row["stderr"] or 0.0 for row in found["pareto"]]
    axes.errorbar(front_bytes, front_fitness, yerr=errors, marker="o", color=COLOURS[0], capsize=2)
    for row in found["pareto"]:
        heads = row.get("heads", ())
        label = f"{len(heads)} heads" if len(heads) > 3 else names_of(heads or row.get("layers", ())) or "base"
        place = (row["kv_bytes_per_token"], row["fitness"])
        axes.annotate(label, place, textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.margins(x=0.15)
    _reference_lines(axes, found)
    return figure


_BOTH = ("layers", "heads")
PLOTS: dict[str, tuple[str, Plot, tuple[str, ...]]] = {  # title, plot, and which units it is for
    "single_layers": ("What each layer gains by itself", plot_singles, ("layers",)),
    "single_heads": ("What each head gains by itself", plot_heads, ("heads",)),
    "pairs": ("Pairs of layers", plot_pairs, ("layers",)),
    "history": ("Best fitness over evaluations", plot_history, _BOTH),
    "pareto": ("Fitness against K/V cache", plot_pareto, _BOTH),
}


def _reference_lines(axes: Axes, found: dict[str, Any], subtracted: float = 0.0) -> None:
    """Draw lines at the scores of base and donor, where known, each minus `subtracted`; also draw the legend."""
    for name, colour in (("base", COLOURS[1]), ("donor", COLOURS[2])):
        if (score := found[f"{name}_score"]) is not None:
            axes.axhline(score - subtracted, color=colour, linestyle="--", linewidth=0.9, label=name)
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)


def _axes(height_inches: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes
