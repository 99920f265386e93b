"""What a search found, as search_result.json has it.

In: the evaluations. Out: a dict of plain values.

    final_results   all combinations that were evaluated on all questions, the best first: layers, fitness, stderr,
                    num_layers, accuracy, kv_bytes_per_token; of the first `COMPARED` also whether the difference to the
                    best, and to the base, is real (p-values of paired tests, Holm-adjusted, and a verdict)
    pareto          those of them, and the base, that no other surpasses in fitness with as small a cache
    base_score, donor_score, single_layer_results, statistics, dropped, failed, settings
"""

from typing import Any

from model_preparation.evaluation.compare.paired import SIGNIFICANCE
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.search.evaluations import BASE, Evaluations
from model_preparation.search.layer_sets import LayerSet
from model_preparation.search.objective import adjusted_p_values

COMPARED = 50
BEST, SAME, WORSE = "the best", "not distinguishable from the best", "worse than the best"
BETTER_THAN_BASE, LIKE_BASE, WORSE_THAN_BASE = (
    "better than the base",
    "not distinguishable from the base",
    "worse than the base",
)


def kv_bytes_per_token(config: LlambaConfig, layers: LayerSet, item_bytes: int) -> int:
    """What each token adds to the K/V cache of a graft: keys and values of every grafted layer."""
    assert config.llama_cfg is not None
    return 2 * config.llama_cfg["num_key_value_heads"] * config.llama_cfg["head_dim"] * item_bytes * len(layers)


def final_results(evaluations: Evaluations, config: LlambaConfig, item_bytes: int, least: int) -> list[dict[str, Any]]:
    """All complete evaluations of at least `least` layers, the best first."""
    ranked = [layers for layers in evaluations.complete if len(layers) >= least]
    rows = [_row(evaluations, layers, config, item_bytes) for layers in ranked]
    values = [evaluations.values(layers) for layers in ranked[:COMPARED]]
    if not values:
        return []
    against_best = [1.0, *adjusted_p_values(evaluations.objective, values[0], values[1:])]
    base = evaluations.values(BASE)
    against_base = adjusted_p_values(evaluations.objective, base, values)
    for row, each, to_best, to_base in zip(rows, values, against_best, against_base, strict=False):
        differs, above = to_base < SIGNIFICANCE, each.mean() > base.mean()
        row |= {
            "p_against_best": to_best,
            "verdict": BEST if row is rows[0] else WORSE if to_best < SIGNIFICANCE else SAME,
            "p_against_base": to_base,
            "verdict_base": LIKE_BASE if not differs else BETTER_THAN_BASE if above else WORSE_THAN_BASE,
        }
    return rows


def pareto_front(rows: list[dict[str, Any]], base: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that no other has more fitness than with as many bytes or fewer, by bytes."""
    front: list[dict[str, Any]] = []
    for row in sorted([base, *rows], key=lambda row: (row["kv_bytes_per_token"], -row["fitness"])):
        if not front or row["fitness"] > front[-1]["fitness"]:
            front.append(
                {name: row[name] for name in ("layers", "fitness", "stderr", "num_layers", "kv_bytes_per_token")}
            )
    return front


def base_row(evaluations: Evaluations, config: LlambaConfig, item_bytes: int) -> dict[str, Any]:
    return _row(evaluations, BASE, config, item_bytes)


def single_layer_results(evaluations: Evaluations, total: int) -> dict[str, dict[str, Any]]:
    """What each layer gains by itself, by its index as text, as far as that was evaluated on all questions."""
    base = evaluations.estimate(BASE)
    return {
        str(layer): {
            "score": evaluations.estimate((layer,)),
            "stderr": evaluations.objective.stderr(evaluations.values((layer,))),
            "gain": evaluations.estimate((layer,)) - base,
        }
        for layer in range(total)
        if evaluations.is_complete((layer,))
    }


def dropped(evaluations: Evaluations) -> list[dict[str, Any]]:
    """Combinations that were dropped as surely worse, with what was seen of them: no score of all questions."""
    return [
        {
            "layers": list(layers),
            "estimate": evaluations.estimate(layers),
            "questions": evaluations.questions_asked(layers),
        }
        for layers in evaluations.dropped
    ]


def _row(evaluations: Evaluations, layers: LayerSet, config: LlambaConfig, item_bytes: int) -> dict[str, Any]:
    values = evaluations.values(layers)
    return {
        "layers": list(layers),
        "fitness": float(values.mean()),
        "stderr": evaluations.objective.stderr(values),
        "num_layers": len(layers),
        "accuracy": float(evaluations.right(layers).mean()),
        "kv_bytes_per_token": kv_bytes_per_token(config, layers, item_bytes),
    }
