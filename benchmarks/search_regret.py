"""What each search method finds, against the true best set: regret and layer passes, on the embedded pair.

All sets of up to three layers are scored. Regret is the score of the best set minus the score of the set that a method
found. The genetic algorithm runs with five seeds; the other methods use no random numbers. `beam` and `ga` get a budget
of 15% of the sets, and `beam` also runs without a budget. All of this runs twice on the same documents: with the loss
of the right answer as the score (nll), and with the share of right answers that greedy decoding would write (accuracy).
Then sets are chosen in other ways: by recall at several lengths, also beyond the pair's training; by text in which
nothing can be looked up; and by the ratio of both. Each set is scored on all of these texts.

    OMP_NUM_THREADS=1 python benchmarks/search_regret.py --output_dir DIR
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model_preparation.checkpoint.extract import extract_layers
from model_preparation.embedded import recall
from model_preparation.jobs.table import table
from model_preparation.search.layer_sets import WHOLE_LAYERS
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.search import search_layers
from model_preparation.search.settings import ACCURACY, NLL, SearchSettings
from model_preparation.search.shared_scoring import SharedScorer

FORMS = {NLL: "embedded_recall", ACCURACY: "embedded_recall_generated"}  # {objective: task}
LENGTHS = (64, 128, 256, 512)  # tokens; a sentence about one person has four
SEEDS = 5

Settings = Callable[..., SearchSettings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--long_limit", type=int, default=30, help="questions of each length")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"{args.output_dir} exists, and its results would be used again. Name a new folder")
    args.output_dir.mkdir(parents=True)
    torch.set_num_threads(1)
    layers = args.output_dir / "donor_layers"
    extract_layers("tiny_llama", layers)

    def settings(name: str, **changes: Any) -> SearchSettings:
        common = {"base": "tiny_llamba", "donor": "tiny_llama", "llama_layers_dir": layers, "max_layers": 3}
        return SearchSettings(args.output_dir / name, **{**common, "objective": NLL, **changes})

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    for axes, (objective, task) in zip(figure.subplots(1, 2), FORMS.items(), strict=True):
        draw(compare_methods(settings, args.limit, objective, task), objective, axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(args.output_dir / "search_regret.png", dpi=110)
    compare_materials(settings, args.long_limit, write_text_task(args.output_dir / "text_task", args.long_limit))


def search(settings: SearchSettings) -> dict[str, Any]:
    found = search_layers(settings)
    assert found is not None
    return found


def compare_methods(settings: Settings, limit: int, objective: str, task: str) -> dict[str, list[tuple[float, float]]]:
    """Print regret and layer passes of every method. Return {method: [(layer passes, regret) of each run]}."""
    given = {"tasks": (task,), "lengths": LENGTHS[:1], "limit": limit, "objective": objective}

    def searched(name: str, **changes: Any) -> dict[str, Any]:
        return search(settings(f"{objective}_{name}", **given, **changes))

    truth = searched("exhaustive", method="exhaustive")
    budget = round(0.15 * truth["statistics"]["evaluations"])
    few = {"budget_evaluations": budget, "population": 12, "beam_width": 3}
    runs = {
        "exhaustive": [truth],
        **{name: [searched(name, method=name)] for name in ("greedy", "beam", "removal")},
        f"beam, {budget} sets": [searched("few_beam", method="beam", **few)],
        f"ga, {budget} sets": [searched(f"ga_{seed}", method="ga", seed=seed, **few) for seed in range(SEEDS)],
    }
    best = truth["final_results"][0]
    rows, points = [], {}
    for name, found in runs.items():
        statistics = [each["statistics"] for each in found]
        regrets = [best["fitness"] - each["final_results"][0]["fitness"] for each in found]
        points[name] = [(each["layer_passes"], regret) for each, regret in zip(statistics, regrets, strict=True)]
        rows.append(
            (
                name,
                span([each["evaluations"] for each in statistics], "{:.0f}"),
                span([each["layer_passes"] for each in statistics], "{:.0f}"),
                span(regrets, "{:.4f}"),
                " / ".join(dict.fromkeys(WHOLE_LAYERS.names(each["final_results"][0]["layers"]) for each in found)),
            )
        )
    print(
        f"{objective}: base {truth['base_score']:.4f}, donor {truth['donor_score']:.4f}, best {best['fitness']:.4f}",
        flush=True,
    )
    print(table(("method", "sets", "layer passes", "regret", "found"), rows), flush=True)
    return points


def compare_materials(settings: Settings, limit: int, text: Path) -> None:
    """Choose sets by recall at several lengths, by text, and by the ratio of both. Print their scores on all texts."""
    materials = {f"{length} tokens": {"tasks": ("embedded_recall",), "lengths": (length,)} for length in LENGTHS}
    materials["text"] = {"tasks": (str(text),)}
    given = {"limit": limit, "method": "beam", "beam_width": 3, "budget_evaluations": 44}
    found = {name: search(settings(name.replace(" ", "_"), **given, **each)) for name, each in materials.items()}
    first = {"limit": limit, "method": "ratio", **next(iter(materials.values()))}
    found["ratio of both"] = search(settings("ratio", **first, second_task=str(text)))
    chosen = {name: tuple(each["final_results"][0]["layers"]) for name, each in found.items()}
    scores: dict[str, list[str]] = {name: [] for name in ("base", "donor", *chosen)}
    for name, each in materials.items():
        setup = ScoringSetup(settings(f"score_{name}", **given, **each))
        scorer = SharedScorer(setup)
        results = {"base": scorer.base(), "donor": scorer.donor_answers()}
        of_sets = dict(scorer.score(set(chosen.values())))
        for which in scores:
            answers = results[which] if which in results else of_sets[chosen[which]]
            fitness, right = (
                float(np.mean(list(values(answers).values())))
                for values in (setup.questions.maximised, setup.questions.values)
            )
            scores[which].append(f"{fitness:.3f}" + ("" if name == "text" else f" ({right:.2f})"))
    sets = {which: WHOLE_LAYERS.names(layers) for which, layers in chosen.items()}
    rows = [(which, sets.get(which, ""), *cells) for which, cells in scores.items()]
    print(table(("chosen by", "layers", *(f"on {name}" for name in materials)), rows), flush=True)


def write_text_task(folder: Path, count: int) -> Path:
    """Write a task of sentences as in the pair's training. No person comes twice, so nothing can be looked up."""
    folder.mkdir()
    people = 12
    names, things = recall._pairs(count, people, torch.Generator().manual_seed(0), held_out=False)
    texts = recall._text(names, things)[:, 1:]
    rows = []
    for ids in texts.tolist():
        words = [recall.WORDS[index] for index in ids]
        rows.append({"context": words[0], "rest": " ".join(words[1:])})
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "pair_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{rest}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "text.yaml").write_text(json.dumps(definition))
    return folder


def span(values: list[float], form: str) -> str:
    """The smallest and the largest value as text, such as "3 to 5"; one number if both are equal."""
    texts = list(dict.fromkeys(form.format(value) for value in (min(values), max(values))))
    return " to ".join(texts)


def draw(points: dict[str, list[tuple[float, float]]], objective: str, axes: Axes) -> None:
    for (name, each), marker in zip(points.items(), "osv^DP", strict=True):
        axes.plot(*zip(*each, strict=True), marker, linestyle="", label=name, alpha=0.7)
    top = max(regret for each in points.values() for _, regret in each) or 0.1
    axes.set(xlabel="layer passes", ylabel=f"regret ({objective})", ylim=(-0.05 * top, 1.1 * top))


if __name__ == "__main__":
    main()
