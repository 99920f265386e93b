"""The result of a search: the content of search_result.json. Its keys:

final_results   the combinations with answers to all questions, the best first; the file has 10,000 at most.
                Each has layers, fitness, stderr, num_layers, accuracy, kv_bytes_per_token. The first
                `COMPARED` also have p-values of paired tests against the best and the base (Holm-adjusted),
                each with a verdict.
pareto          the best fitness for each size of the K/V cache: the base and the combinations that have more fitness
                than all others with an equal or smaller cache
base_score, donor_score, single_layer_results, statistics, dropped, failed, settings, and more

A search over heads has the keys heads, num_heads, single_head_results and heads_per_layer; a head is like "13:16".

If the search starts from a checkpoint, `base` is the checkpoint, and `start_layers` are its grafted layers. They are in
every combination; `layers` are only the added layers.
"""

import os
from pathlib import Path
from typing import Any

from model_preparation.creation_time import creation_time
from model_preparation.evaluation.compare.costs import pareto_front
from model_preparation.evaluation.compare.paired import SIGNIFICANCE
from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.layer_sets import BASE, LayerSet, SearchSpace
from model_preparation.search.scoring_setup import ScoringSetup

COMPARED = 50
_LIKE = "not distinguishable from"


def search_result(
    setup: ScoringSetup,
    space: SearchSpace,
    scores: CandidateScores,
    donor: dict[str, Any] | None,
    *,
    budget_spent: bool,
) -> dict[str, Any]:
    """The content of search_result.json.

    Args:
        setup, space: what was searched.
        scores: all evaluations.
        donor: the donor's own `accuracy` and `fitness`, if it was scored.
        budget_spent: whether the budget ended the search.
    """
    settings, units = setup.settings, space.units
    rows = _final_results(scores, space, setup)
    base = _row(scores, BASE, setup)
    return {
        "objective": settings.objective,
        "final_results": rows,
        "pareto": _pareto_front([base, *rows], units.word),
        "base_score": base["fitness"],
        "base": _place(settings.origin),
        **({"start_layers": sorted(space.fixed)} if space.fixed else {}),
        "base_stderr": base["stderr"],
        "base_accuracy": base["accuracy"],
        "donor_score": None if donor is None else donor["fitness"],
        "donor_accuracy": None if donor is None else donor["accuracy"],
        "donor": _place(settings.donor),
        "llama_layers_dir": os.path.abspath(setup.planned.donor.folder),
        "tokenizer": settings.tokenizer,
        "questions": len(setup.questions.questions),
        "total_layers": setup.pair.layers,
        f"single_{units.word[:-1]}_results": _single_results(scores, space),
        **({"heads_per_layer": units.heads} if units.heads else {}),
        "dropped": [
            {
                units.word: units.written(layers),
                "estimate": scores.estimate(layers),  # from some of the questions
                "questions": scores.questions_asked(layers),
            }
            for layers in scores.dropped
        ],
        "failed": [{units.word: units.written(layers), "reason": reason} for layers, reason in scores.failed.items()],
        "statistics": {**scores.statistics(), "budget_spent": budget_spent},
        "search": settings.described(),
        "settings": setup.recorded,
        "inputs": setup.inputs,
        "date": creation_time(),
    }


def _final_results(scores: CandidateScores, space: SearchSpace, setup: ScoringSetup) -> list[dict[str, Any]]:
    """All complete evaluations of the sizes that were searched, the best first."""
    ranked = [layers for layers in scores.complete if layers in space]
    rows = [_row(scores, layers, setup) for layers in ranked]
    values = [scores.values(layers) for layers in ranked[:COMPARED]]
    if not values:
        return []
    against_best = [1.0, *scores.objective.adjusted_p_values(values[0], values[1:])]
    base = scores.values(BASE)
    against_base = scores.objective.adjusted_p_values(base, values)
    for row, each, to_best, to_base in zip(rows, values, against_best, against_base, strict=False):
        relation = "better than" if each.mean() > base.mean() else "worse than"
        row |= {
            "p_against_best": to_best,
            "verdict": f"{'worse than' if to_best < SIGNIFICANCE else _LIKE} the best",
            "p_against_base": to_base,
            "verdict_base": f"{relation if to_base < SIGNIFICANCE else _LIKE} the base",
        }
    rows[0]["verdict"] = "the best"
    return rows


def _pareto_front(rows: list[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    """The rows with more fitness than all other rows with as many bytes or fewer, sorted by bytes."""
    names = (word, "fitness", "stderr", f"num_{word}", "kv_bytes_per_token")
    front = pareto_front([row["kv_bytes_per_token"] for row in rows], [row["fitness"] for row in rows])
    return [{name: rows[place][name] for name in names} for place in front]


def _single_results(scores: CandidateScores, space: SearchSpace) -> dict[str, dict[str, Any]]:
    """Score, standard error and gain of each single layer or head that has answers to all questions, by its name."""
    base = scores.estimate(BASE)
    return {
        space.units.names(single): {
            "score": scores.estimate(single),
            "stderr": scores.objective.stderr(scores.values(single)),
            "gain": scores.estimate(single) - base,
        }
        for single in space.singles
        if scores.is_complete(single)
    }


def _row(scores: CandidateScores, layers: LayerSet, setup: ScoringSetup) -> dict[str, Any]:
    values, pair, units = scores.values(layers), setup.pair, setup.pair.units
    return {
        units.word: units.written(layers),
        "fitness": float(values.mean()),
        "stderr": scores.objective.stderr(values),
        f"num_{units.word}": len(layers),
        "accuracy": float(scores.right(layers).mean()),
        "kv_bytes_per_token": pair.kv_bytes_per_token(units.kept_kv_heads(layers)),
    }


def _place(name: str | None) -> str | None:
    """The absolute path of `name` if it is a folder or file on the disk. Other names and hub ids stay as they are."""
    return os.path.abspath(name) if name is not None and Path(name).exists() else name
