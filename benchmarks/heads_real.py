"""Heads that a search chose, against whole layers with at least as many K/V bytes, on documents that no search used.

The searches chose heads and layers on the first `--chosen_on` documents of the task. This script scores the next
documents: minus the loss per token of the right answer, and the paired difference from the best layers with its 95%
confidence interval.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from model_preparation.jobs.table import table
from model_preparation.search.layer_sets import names_of
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import HEADS, LAYERS, NLL, SearchSettings
from model_preparation.search.shared_scoring import SharedScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", type=Path, nargs="+", required=True, help="search_result.json of searches over heads"
    )
    parser.add_argument("--layers", type=Path, nargs="+", required=True, help="the same of searches over layers")
    parser.add_argument("--chosen_on", type=int, required=True, help="the --limit of these searches")
    parser.add_argument("--documents", type=int, required=True, help="documents to score, after those of --chosen_on")
    parser.add_argument("--folder", type=Path, required=True, help="for hidden states that do not fit into memory")
    args = parser.parse_args()
    best = {unit: best_by_bytes(getattr(args, unit), unit) for unit in (LAYERS, HEADS)}
    found = json.loads(args.heads[0].read_text())
    asked = found["settings"]
    settings = SearchSettings(
        args.folder,
        base=found["base"],
        llama_layers_dir=found["llama_layers_dir"],
        tasks=tuple(asked["tasks"]),
        lengths=tuple(asked["recall"]["lengths"]),
        limit=args.chosen_on + args.documents,
        batch_size=4,
        objective=NLL,
    )
    scores = {unit: held_out(settings, unit, list(best[unit].values()), args.chosen_on) for unit in best}
    rows: list[tuple[Any, ...]] = [("nothing", 0, mean(scores[LAYERS][()]), "", "")]
    for kv_bytes, layers in sorted(best[LAYERS].items()):
        theirs = scores[LAYERS][tuple(layers)]
        rows.append((f"layers {names_of(layers)}", kv_bytes, mean(theirs), "", ""))
        within = [each for each in best[HEADS] if each <= kv_bytes]
        if within:
            heads = best[HEADS][max(within)]
            ours = scores[HEADS][tuple(heads)]
            difference = ours - theirs
            low, high = stats.t.interval(0.95, len(difference) - 1, difference.mean(), stats.sem(difference))
            interval = f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})"
            rows.append((f"heads {names_of(heads)}", max(within), mean(ours), interval, len(difference)))
    rows = [tuple(map(str, row)) for row in rows]
    print(table(("grafted", "K/V bytes per token", "nll", "over the layers, 95%", "documents"), rows))


def best_by_bytes(results: list[Path], unit: str) -> dict[int, list[Any]]:
    """{K/V bytes per token: the set with the best score in the searches among sets with at most so many bytes}."""
    rows = [row for path in results for row in json.loads(path.read_text())["final_results"]]
    return {
        size: max((row for row in rows if row["kv_bytes_per_token"] <= size), key=lambda row: row["fitness"])[unit]
        for size in {row["kv_bytes_per_token"] for row in rows}
    }


def held_out(settings: SearchSettings, unit: str, sets: list[list[Any]], chosen_on: int) -> dict[tuple, np.ndarray]:
    """{set: minus the loss per token of each document after the first `chosen_on`}. The base has the key ()."""
    setup = ScoringSetup(dataclasses.replace(settings, unit=unit))
    scorer = SharedScorer(setup)
    results: dict[tuple[Any, ...], Any] = {(): scorer.base()}
    units = setup.pair.units
    results |= {tuple(units.written(each)): found for each, found in scorer.score({units.read(each) for each in sets})}
    values = {each: setup.questions.maximised(found) for each, found in results.items()}
    return {
        each: np.array([found[question] for question in sorted(found)])[chosen_on:] for each, found in values.items()
    }


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f}"


if __name__ == "__main__":
    main()
