"""The search methods: which combinations are evaluated, in which order. `CandidateScores` keeps their scores.

A unit is a layer, or a head with `--unit heads`. No library is used. The methods need a common budget and
journal, and races that drop combinations early. Combinations with common layers must be scored together.
"""

import random
from collections.abc import Callable

from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.genetic import genetic
from model_preparation.search.layer_sets import BASE, LayerSet, SearchSpace, normal
from model_preparation.search.recall_ratio import ratio
from model_preparation.search.settings import SearchSettings


def search(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Run the method that the settings name. `space.seed_sets` are scored first, so the method knows their scores."""
    if space.seed_sets:
        scores.evaluate(space.seed_sets)
    METHODS[settings.method](space, scores, settings)


def singles(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Score every unit alone."""
    scores.evaluate(space.singles, settings.top)


def exhaustive(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Score every combination in the space."""
    scores.evaluate(space.all(), settings.top)


def greedy(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Add unit after unit, each time the unit that improves the score most."""
    _grow(space, scores, 1)


def beam(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Add unit after unit to the best few combinations of each size; then refine the best combination."""
    _grow(space, scores, settings.beam_width)
    refine(space, scores)


def ga(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Run a genetic algorithm; then refine the best combination."""
    rng = random.Random(settings.seed)
    genetic(space, scores, rng, settings.population, settings.generations, settings.patience)
    refine(space, scores)


def removal(space: SearchSpace, scores: CandidateScores, settings: SearchSettings) -> None:
    """Start with all layers. Each time, remove the layer whose removal lowers the score least (arXiv 2601.11667)."""
    kept: LayerSet = tuple(space.free)
    if kept in space:
        scores.evaluate([kept])
    while len(kept) > space.least:
        found = scores.evaluate([normal({*kept} - {layer}) for layer in kept], 1)
        if not found:  # all evaluations failed
            return
        kept = found[0]


METHODS: dict[str, Callable[[SearchSpace, CandidateScores, SearchSettings], None]] = {
    method.__name__: method for method in (singles, exhaustive, greedy, beam, ga, removal, ratio)
}


def refine(space: SearchSpace, scores: CandidateScores) -> None:
    """Add, drop or swap one unit of the best combination, as long as that makes it better."""
    while candidates := [layers for layers in scores.complete if layers in space]:
        best = candidates[0]
        found = scores.evaluate([best, *space.by_promise(space.neighbours(best), scores)], 1)
        if scores.estimate(found[0]) <= scores.estimate(best):
            return


def _grow(space: SearchSpace, scores: CandidateScores, width: int) -> None:
    """Add units one by one. Of each size, the best `width` combinations get another unit."""
    kept: list[LayerSet] = [BASE]
    for size in range(1, space.most + 1):
        if size == 1 and len(space.prior) == len(space.free):  # `prior` has the gain of every single unit
            kept = sorted(space.singles, key=lambda layers: (-space.prior[layers[0]], layers))[:width]
            continue
        more = dict.fromkeys(new for layers in kept for new in space.with_one_more(layers))
        share = scores.room // (space.most - size + 1) if size > 1 and scores.room is not None else len(more)
        wanted = space.by_promise(more, scores)[: max(share, width)]
        seeds = [layers for layers in space.seed_sets if len(layers) == size]  # evaluated already
        kept = scores.evaluate([*seeds, *wanted], width)[:width]
