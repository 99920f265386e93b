"""A comparison as plots: every model's scores by subject, its gains over the baseline, and scores against costs.

Plots are saved as PNG files. For the HTML page they are SVG, where text and lines have the page's colours.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names

from model_preparation.evaluation.compare.compare import GROUP, OVERALL, SUBJECT, UNCLEAR, Comparison, Row
from model_preparation.evaluation.compare.costs import AGAINST_SCORE
from model_preparation.evaluation.efficiency import MEASURED
from model_preparation.io.complete_file import write_file

Plot = Callable[[Any], Figure]  # the argument is what the plot shows, such as a Comparison

COLOURS = ("#3b82c4", "#e08a1e", "#2ba37a", "#c75a9a", "#8c6bd1", "#8a8f98")  # easy to tell apart on white and on black
# No other part of a plot has these two colours. So in an SVG they can be replaced by the colours of the page.
INK, PAPER = "#000102", "#fffefd"
# Fonts with Chinese characters, in the order in which they are tried.
_CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
_LINE_INCHES, _WIDTH_INCHES = 0.15, 7.2
_PNG: dict[str, Any] = {"format": "png", "dpi": 150, "facecolor": "white"}


def plot_scores(comparison: Comparison) -> Figure:
    """A line per group and subject, with a point per model and its standard error on both sides."""
    figure, axes, rows = _lines(comparison)
    models = len(comparison.models)
    for model, each in enumerate(comparison.models):
        at = [line + _offset(model, models) for line in range(len(rows))]
        means = [row.scores[model].mean for row in rows]
        errors = [row.scores[model].stderr or 0.0 for row in rows]
        _points(axes, means, at, errors, model=model, name=each.name)
    axes.set_xlabel(f"{comparison.metric}, ± standard error")
    _legend(axes)
    return figure


def plot_gains(comparison: Comparison) -> Figure:
    """A line per group and subject, with a point per model (not the baseline): its difference, and the 95% interval."""
    figure, axes, rows = _lines(comparison)
    models = len(comparison.models) - 1
    axes.axvline(0, color=INK, linewidth=0.8)
    for model in range(models):
        differences = [row.differences[model] for row in rows]
        gains = [difference.difference for difference in differences]
        ends = [difference.interval or (difference.difference,) * 2 for difference in differences]
        errors = [[gain - low for gain, (low, _) in zip(gains, ends, strict=True)]]
        errors += [[high - gain for gain, (_, high) in zip(gains, ends, strict=True)]]
        at = [line + _offset(model, models) for line in range(len(rows))]
        filled = [difference.verdict != UNCLEAR for difference in differences]
        _points(axes, gains, at, errors, model=model + 1, name=comparison.models[model + 1].name, filled=filled)
    axes.set_xlabel(
        f"{comparison.metric}: difference to {comparison.models[0].name}, 95% interval\n"
        "filled: significant; hollow: not significant"
    )
    _legend(axes)
    return figure


def plot_efficiency(found: dict[str, Any]) -> Figure:
    """A panel per measured field: every model's values against the length of the context."""
    figure = Figure(figsize=(_WIDTH_INCHES, 5.0), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (field, (words, unit, size)) in zip(panels, MEASURED.items(), strict=True):
        for model, each in enumerate(found["models"]):
            values = [row[field] / size for row in each["contexts"]]
            x = [row["context"] for row in each["contexts"]]
            axes.plot(x, values, "o-", color=COLOURS[model % len(COLOURS)], markersize=4, label=each["name"])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(f"{words}, {unit}")
        axes.set_ylim(bottom=0)
        axes.grid(linewidth=0.4, alpha=0.4)
    _legend(axes)
    return figure


def plot_costs(comparison: Comparison) -> Figure:
    """Score against time per token, and score against cache, for models with a known cost, with the Pareto front."""
    figure = Figure(figsize=(_WIDTH_INCHES, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    scores = comparison.of_kind(OVERALL)[0].scores
    for axes, field in zip(panels, AGAINST_SCORE, strict=True):
        words, unit, size = MEASURED[field]
        places = {}
        for model, each in enumerate(comparison.models):
            if each.cost is not None:
                places[each.name] = x, y = each.cost.values[field] / size, scores[model].mean
                _points(axes, [x], [y], [scores[model].stderr or 0.0], model=model, name=each.name, upright=True)
        front = [places[name] for name in comparison.fronts.get(field, ())]
        if front:  # a front of one point has no line, but the legend still names it
            axes.step(
                *zip(*front, strict=True), where="post", color=INK, linewidth=0.6, alpha=0.5, label="Pareto front"
            )
        axes.set_xlabel(f"{words}, {unit}")
        axes.margins(x=0.15)
        axes.grid(linewidth=0.4, alpha=0.4)
    panels[0].set_ylabel(f"{comparison.metric}, ± standard error")
    _legend(panels[0])
    return figure


def save_png(plot: Plot, shown: Any, path: Path) -> None:
    """Draw the plot of `shown` into a PNG file with a white background."""
    with _drawing():
        plot(shown).savefig(path, **_PNG)


def save_both(plot: Plot, shown: Any, name: str, folder: Path) -> Markup:
    """Draw the plot of `shown` into NAME.png in `folder`, and return it as SVG. The SVG's ids begin with `name`."""
    with _drawing(), io.BytesIO() as png, io.StringIO() as file:
        figure = plot(shown)
        figure.savefig(png, **_PNG)
        figure.set_layout_engine("none")  # the SVG has the layout of the PNG, which is not computed again
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        write_file(folder / f"{name}.png", png.getvalue())
        text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--page)")
    return Markup(re.sub(r'(\bid="|\burl\(#|href="#)', rf"\g<1>{name}-", text))  # ids must be unique in a page


# {name of the file: (heading, plot)}.
PLOTS: dict[str, tuple[str, Plot]] = {
    "accuracy_by_subject": ("Score by subject", plot_scores),
    "gain_by_subject": ("Gain over the baseline", plot_gains),
    "score_by_cost": ("Score against cost", plot_costs),
}


def plots_of(comparison: Comparison) -> dict[str, tuple[str, Plot]]:
    """The plots for which the comparison has numbers."""
    has_costs = any(model.cost for model in comparison.models)
    return {name: each for name, each in PLOTS.items() if has_costs or each[1] is not plot_costs}


def _lines(comparison: Comparison) -> tuple[Figure, Axes, list[Row]]:
    """An empty plot, its axes, and its rows with their labels: first groups, in bold, then subjects by group."""
    rows = comparison.of_kind(OVERALL, GROUP)
    groups = [row.label for row in comparison.of_kind(GROUP)]
    subjects = comparison.of_kind(SUBJECT)
    order = {label: place for place, label in enumerate(groups)}
    rows += sorted(subjects, key=lambda row: (order.get(row.group, -1), -row.scores[0].mean))
    height = len(rows) * max(1.2 * _LINE_INCHES, len(comparison.models) * 0.6 * _LINE_INCHES) + 1.4
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if row.kind == SUBJECT else "bold")
    previous = ""
    for line, row in enumerate(rows):
        if row.kind == SUBJECT and (row.group != previous or line == len(rows) - len(subjects)):
            axes.axhline(line - 0.5, color=INK, linewidth=0.4, alpha=0.5)
            right = ("axes fraction", "data")  # the coordinates of a point at the axes' right end
            axes.annotate(row.group, (1, line), (4, 0), right, "offset points", fontsize=7, va="center")
            previous = row.group
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.4, alpha=0.4)
    axes.spines[["left", "right", "top"]].set_visible(False)
    return figure, axes, rows


def _points(
    axes: Axes,
    x: list[float],
    y: list[float],
    errors: list,
    *,
    model: int,
    name: str,
    filled: list[bool] | None = None,
    upright: bool = False,
) -> None:
    """Draw a model's points; they are hollow where `filled` is False. Error bars are vertical if `upright`."""
    colour = COLOURS[model % len(COLOURS)]
    bars: dict[str, Any] = {"yerr" if upright else "xerr": errors}
    axes.errorbar(x, y, **bars, fmt="none", ecolor=colour, elinewidth=1.1)
    faces = [colour if full else PAPER for full in filled or [True] * len(x)]
    axes.scatter(x, y, s=14, c=faces, edgecolors=colour, linewidths=1.1, zorder=3)
    axes.plot([], [], "o-", color=colour, markersize=4, linewidth=1.1, label=name)  # for the legend


def _offset(model: int, models: int) -> float:
    """How far a model's points are above or below their line, so that models do not cover each other."""
    return (model - (models - 1) / 2) * 0.7 / models


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    axes.figure.legend(handles, names, loc="outside upper left", ncols=1, frameon=False)


@contextmanager
def _drawing() -> Iterator[None]:
    """Set matplotlib's options within the block.

    Names are text, not formulas, and may be Chinese. An SVG keeps text as text. Equal plots have equal bytes.
    """
    installed = set(get_font_names())
    options: dict[Any, Any] = {
        "text.parse_math": False,
        "font.family": ["DejaVu Sans", *(font for font in _CHINESE if font in installed)],
        "font.size": 8,
        "svg.fonttype": "none",
        "svg.hashsalt": "comparison",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the missing character is drawn as a box
        yield
