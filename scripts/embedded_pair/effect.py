"""What grafting does to the embedded pair: scores of base, donor, every single layer, every pair of layers, all layers.

The scores are written into effect.json and effect.png. The package builds and scores the checkpoints. Scores of an
earlier run are used again.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from model_preparation import build_checkpoint, evaluate_checkpoint, extract_layers
from model_preparation.evaluation.tasks import load_tasks
from model_preparation.io.complete_file import write_file

EFFECT, PLOT = "effect.json", "effect.png"
QUESTIONS_PER_PASS = 64


def measure(donor: Path, base: Path, task: Path, work: Path, *, layers: int, progress: Progress) -> dict[str, Any]:
    """Score base, donor and all grafts; returns the contents of effect.json.

    Args:
        donor, base, task: folders.
        work: the folder for the donor's layers, the checkpoints and the answers.
        layers: the number of layers of each model.
    """
    store = work / "layers"
    if not (store / "metadata.json").is_file():
        extract_layers(str(donor), store)
    combinations = list(_combinations(layers))
    tasks = load_tasks([str(task)])
    bar = progress.add_task("Scoring grafts", total=len(combinations) + 2)

    def score(model: Path) -> dict[str, Any]:
        result = evaluate_checkpoint(model, tasks=tasks, batch_size=QUESTIONS_PER_PASS, results_dir=work / "results")
        progress.update(bar, advance=1)
        return result

    scores: dict[str, float] = {}
    for chosen in combinations:
        checkpoint = work / "checkpoints" / _name(chosen)
        if not (checkpoint / "checkpoint_info.json").is_file():
            build_checkpoint(str(base), list(chosen), store, checkpoint)
        scores[" ".join(map(str, chosen))] = score(checkpoint)["score"]
    of_base, of_donor = score(base), score(donor)
    everything = " ".join(map(str, range(layers)))
    return {
        "questions": of_base["questions"],
        "base": of_base["score"],
        "donor": of_donor["score"],
        "all layers": scores.pop(everything),
        "single layers": {name: value for name, value in scores.items() if " " not in name},
        "pairs of layers": {name: value for name, value in scores.items() if " " in name},
    }


def write_effect(folder: Path, effect: dict[str, Any]) -> None:
    """Write effect.json and effect.png into `folder`."""
    write_file(folder / EFFECT, json.dumps(effect, indent=2) + "\n")
    _plot(effect).savefig(folder / PLOT, dpi=130, metadata={"Software": None})


def summary(effect: dict[str, Any]) -> str:
    """A Markdown table of base, worst and best single layer, worst and best pair, all layers, and donor."""
    rows = [("base, nothing grafted", effect["base"])]
    for kind, title in (("single layers", "single layer, number"), ("pairs of layers", "pair of layers, numbers")):
        scores = effect[kind]
        for word, choice in (("worst", min), ("best", max)):
            name = choice(scores, key=scores.__getitem__)
            rows.append((f"{word} {title} {name.replace(' ', ' and ')}", scores[name]))
    rows += [("all layers grafted", effect["all layers"]), ("donor", effect["donor"])]
    lines = [f"| {title} | {score:.3f} |" for title, score in rows]
    return "\n".join(["| | score |", "|---|---|", *lines])


def matrix(effect: dict[str, Any]) -> str:
    """A Markdown table of every pair: row and column are the two grafted layers. The diagonal has single layers."""
    scores = effect["single layers"] | effect["pairs of layers"]
    layers = list(effect["single layers"])
    lines = ["| | " + " | ".join(layers) + " |", "|---" * (len(layers) + 1) + "|"]
    for row in layers:
        cells = []
        for column in layers:
            name = row if row == column else f"{row} {column}"
            cells.append(f"{scores[name]:.3f}" if name in scores else "")
        lines.append(f"| **{row}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _combinations(layers: int) -> Iterator[tuple[int, ...]]:
    yield from itertools.combinations(range(layers), 1)
    yield from itertools.combinations(range(layers), 2)
    yield tuple(range(layers))


def _name(chosen: tuple[int, ...]) -> str:
    return "layers_" + "_".join(map(str, chosen))


def _plot(effect: dict[str, Any]) -> Figure:
    """On the left, every single layer, with lines for base and donor; on the right, every pair."""
    singles = list(effect["single layers"].values())
    count = len(singles)
    pairs = [[float("nan")] * count for _ in range(count)]
    for name, score in effect["pairs of layers"].items():
        low, high = map(int, name.split())
        pairs[low][high] = pairs[high][low] = score
    for index, score in enumerate(singles):
        pairs[index][index] = score
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    bars, grid = figure.subplots(1, 2)
    bars.bar(range(count), singles, color="#4477aa")
    bars.axhline(effect["donor"], color="#228833", label="donor")
    bars.axhline(effect["base"], color="#cc3311", label="base")
    bars.axhline(0.25, color="grey", linestyle=":", label="chance")
    bars.set(xlabel="layer grafted", ylabel="score", ylim=(0, 1.05), title="One layer", xticks=range(count))
    bars.legend(loc="center left")
    image = grid.imshow(pairs, vmin=0.25, vmax=1, origin="lower")
    grid.set(xlabel="layer", ylabel="layer", title="Two layers", xticks=range(count), yticks=range(count))
    figure.colorbar(image, ax=grid, label="score")
    return figure
