"""The methods: which combinations a search evaluates, in which order. The results are in the `CandidateScores`.

The methods are our own. Libraries for genetic algorithms (DEAP, pymoo, PyGAD) score one individual at a time; here a
whole generation has to be scored together, as its members share layers.
"""

import random
from collections.abc import Callable

from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.genetic import genetic
from model_preparation.search.layer_sets import BASE, LayerSet, SearchSpace, normal
from model_preparation.search.settings import SearchSettings

_LEAST_SHARE = 0.1  # the second task's score loses at least this share of its largest loss: noise must not decide


def search(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Run the method that the settings name. The seeds are scored first, so the method knows their scores."""
    if space.seed_sets:
        scores.evaluate(space.seed_sets)
    METHODS[settings.method](space, scores, settings)


def singles(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Score every layer by itself."""
    scores.evaluate(space.singles, settings.top)


def exhaustive(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Score every combination."""
    scores.evaluate(space.all(), settings.top)


def greedy(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Add layer after layer, each time the one that improves the score most."""
    _grow(space, scores, 1)


def beam(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Add layer after layer to the best few of each size; then refine the best."""
    _grow(space, scores, settings.beam_width)
    refine(space, scores)


def ga(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Run a genetic algorithm; then refine the best."""
    rng = random.Random(settings.seed)
    genetic(space, scores, rng, settings.population, settings.generations, settings.patience)
    refine(space, scores)


def removal(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Start with all layers. Each time, remove the layer without which the score loses least (arXiv 2601.11667)."""
    kept: LayerSet = tuple(space.free)
    if kept in space:
        scores.evaluate([kept])
    while len(kept) > space.least:
        found = scores.evaluate([normal({*kept} - {layer}) for layer in kept], 1)
        if not found:  # all failed
            return
        kept = found[0]


def ratio(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Order layers by what recall loses without the layer, divided by what the second task loses.

    This is as in HALO (arXiv 2601.22156). R and C are the scores in recall and in the second task without layer i. The
    maxima are over all i: importance of i = (max R - R) / (max C - C + epsilon).
    HALO scores all i once per task. Here they are scored once, with the questions of both tasks. HALO's code has an
    epsilon of 1e-10 and cuts the ratio at 50, so a layer without which C loses nothing always wins. Here the divisor is
    at least `_LEAST_SHARE` of the largest divisor.
    """
    without = {layer: normal({*space.free} - {layer}) for layer in space.free}
    found = scores.evaluate(list(without.values()))
    values = {layer: scores.values(each) for layer, each in without.items() if each in found}
    second = scores.objective.second
    assert second is not None  # checks.py refuses a ratio without a second task
    recall, common = ({layer: float(each[of].mean()) for layer, each in values.items()} for of in (~second, second))
    most = max(common.values(), default=0.0)
    floor = max((most - min(common.values(), default=0.0)) * _LEAST_SHARE, 1e-9)

    def importance(layer: int) -> float:
        return (max(recall.values()) - recall[layer]) / max(most - common[layer], floor)

    order = sorted(values, key=lambda layer: (-importance(layer), layer))
    scores.evaluate([normal(order[:size]) for size in range(space.least, min(space.most, len(order)) + 1)])


METHODS: dict[str, Callable[[SearchSpace, CandidateScores, SearchSettings], None]] = {
    method.__name__: method for method in (singles, exhaustive, greedy, beam, ga, removal, ratio)
}


def refine(space: SearchSpace, scores: CandidateScores) -> None:
    """Add, drop or swap one layer of the best combination, as long as that makes it better."""
    while candidates := [layers for layers in scores.complete if layers in space]:
        best = candidates[0]
        found = scores.evaluate([best, *space.by_promise(space.neighbours(best), scores)], 1)
        if scores.estimate(found[0]) <= scores.estimate(best):
            return


def _grow(space: SearchSpace, scores: CandidateScores, width: int) -> None:
    kept: list[LayerSet] = [BASE]
    for size in range(1, space.most + 1):
        if size == 1 and len(space.prior) == len(space.free):  # their scores are known before the search
            kept = sorted(space.singles, key=lambda layers: (-space.prior[layers[0]], layers))[:width]
            continue
        more = dict.fromkeys(new for layers in kept for new in space.with_one_more(layers))
        share = scores.room // (space.most - size + 1) if size > 1 and scores.room is not None else len(more)
        wanted = space.by_promise(more, scores)[: max(share, width)]
        seeds = [layers for layers in space.seed_sets if len(layers) == size]  # evaluated already
        kept = scores.evaluate([*seeds, *wanted], width)[:width]
