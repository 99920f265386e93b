"""A genetic algorithm over sets of layers.

The first generation has sets of the best single layers, pairs with the best layer, sets of layers at equal
distances, and random sets. Crossing and mutation of good sets make the next generations. Patterns guide
mutation. Patterns are layers and pairs of layers that are more frequent in good sets than in all sets.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.layer_sets import LayerSet, SearchSpace, normal

# Share of a generation that is kept from before: the best sets so far. No race drops them.
_ELITE_SHARE = 0.1
_GOOD = 0.25  # share of the known sets that counts as good for the patterns
_TOURNAMENT_SIZE = 3  # this many sets are drawn, and the best of them becomes a parent
_CROSSOVER_RATE = 0.9  # chance that a child has two parents
# A layer to add is drawn by weight. This is the chance that a weight comes from the patterns; else it is 1.
_PATTERN_RATE = 0.7
_ATTEMPTS = 20  # how often to try to make a set that is new


def genetic(
    space: SearchSpace, scores: CandidateScores, rng: random.Random, population: int, generations: int, patience: int
) -> None:
    """Evaluate up to `generations` generations. Stop earlier if `patience` of them in a row find no better set.

    Also stop when less budget is left than two generations need. Refinement gets the rest.

    Raises:
        BudgetSpent: for the same reasons as `CandidateScores.evaluate`.
    """
    elite_size = max(1, round(_ELITE_SHARE * population))
    if len(space.prior) < len(space.free):
        scores.evaluate(space.singles, elite_size)
    members = _first_generation(space, scores, rng, population)
    best, generations_without_gain = float("-inf"), 0
    for generation in range(generations):
        ranked = scores.evaluate(members, elite_size)
        known = scores.ranked(layers for layers in scores.order if layers in space)
        if not ranked or not known:
            return
        found = scores.estimate(known[0])
        generations_without_gain = 0 if found > best else generations_without_gain + 1
        best = max(best, found)
        is_little_left = scores.room is not None and scores.room < 2 * population  # refinement gets the rest
        if generations_without_gain >= patience or generation == generations - 1 or is_little_left:
            return
        parents = known[:population]
        elite = known[:elite_size]
        patterns = _Patterns(known)
        children = [_child(space, scores, parents, patterns, rng) for _ in range(population - len(elite))]
        members = list(dict.fromkeys([*elite, *children]))


class _Patterns:
    """How much more frequent layers and pairs of layers are in good sets than in all sets."""

    def __init__(self, ranked: Sequence[LayerSet]):
        good = ranked[: max(2, round(_GOOD * len(ranked)))]
        self._good, self._all = _count_patterns(good), _count_patterns(ranked)
        self._sizes = len(good), len(ranked)

    def weight(self, layer: int, layers: LayerSet) -> float:
        """How good a layer looks together with `layers`. Patterns that were never seen count as good."""
        patterns = [(layer,), *(normal([layer, other]) for other in layers)]
        return sum(map(self._ratio, patterns)) / len(patterns)

    def _ratio(self, pattern: LayerSet) -> float:
        good, everywhere = self._sizes
        # Add-one smoothing: the ratio of a pattern that was never seen is neither 0 nor a division by 0.
        return ((self._good[pattern] + 1) / (good + 1)) / ((self._all[pattern] + 1) / (everywhere + 1))


def _count_patterns(sets: Sequence[LayerSet]) -> Counter[LayerSet]:
    return Counter(pattern for layers in sets for size in (1, 2) for pattern in combinations(layers, size))


def _first_generation(
    space: SearchSpace, scores: CandidateScores, rng: random.Random, population: int
) -> list[LayerSet]:
    sizes = range(max(space.least, 1), space.most + 1)
    gains = space.gains(scores)
    best = sorted(gains, key=lambda layer: (-gains[layer], layer))
    found = [normal(best[:size]) for size in sizes]
    promising = best[: 2 * space.most]
    # Some layers help only together with others. So the best layer is tried with many others.
    pairs = [pair for pair in space.with_one_more(normal(best[:1])) if pair in space]
    found += space.by_promise(pairs, scores)[: population // 2]
    found += [space.spread(size) for size in sizes]
    found = list(dict.fromkeys(layers for layers in found if layers in space))[:population]
    for _ in range(_ATTEMPTS * population):
        if len(found) >= population:
            break
        if rng.random() < 0.5 and len(promising) >= space.most:
            new = normal(rng.sample(promising, rng.choice(sizes)))
        else:
            new = space.draw(rng)
        if new not in found and new in space:
            found.append(new)
    return found


def _child(
    space: SearchSpace, scores: CandidateScores, parents: Sequence[LayerSet], patterns: _Patterns, rng: random.Random
) -> LayerSet:
    """A set made from one parent or two. It is new, unless all `_ATTEMPTS` attempts give sets that are known."""
    child = parents[0]
    for _ in range(_ATTEMPTS):
        one, other = (_tournament_winner(parents, rng) for _ in range(2))
        child = _cross(one, other, rng) if rng.random() < _CROSSOVER_RATE else one
        child = _mutate(space, child, patterns, rng)
        if not scores.is_known(child):
            break
    return child


def _tournament_winner(parents: Sequence[LayerSet], rng: random.Random) -> LayerSet:
    return parents[min(rng.randrange(len(parents)) for _ in range(_TOURNAMENT_SIZE))]  # sorted, the best first


def _cross(one: LayerSet, other: LayerSet, rng: random.Random) -> LayerSet:
    """The layers that both have, and with chance 1/2 each layer that only one has."""
    both = set(one) & set(other)
    return normal([*both, *(layer for layer in normal([*one, *other]) if layer not in both and rng.random() < 0.5)])


def _mutate(space: SearchSpace, layers: LayerSet, patterns: _Patterns, rng: random.Random) -> LayerSet:
    """Add, drop or swap a layer, or change nothing; then bring the set to an allowed size."""
    change = rng.choice(("add", "drop", "swap", "none"))
    if change in ("drop", "swap") and layers:
        layers = _without_one(layers, patterns, rng)
    if change in ("add", "swap"):
        layers = _with_one(space, layers, patterns, rng)
    while not space.fits(layers):
        layers = _without_one(layers, patterns, rng)
    while len(layers) < max(1, space.least):
        layers = _with_one(space, layers, patterns, rng)
    return layers


def _with_one(space: SearchSpace, layers: LayerSet, patterns: _Patterns, rng: random.Random) -> LayerSet:
    free = [layer for layer in space.free if layer not in layers]
    if not free:
        return layers
    weights = [patterns.weight(layer, layers) if rng.random() < _PATTERN_RATE else 1.0 for layer in free]
    return normal([*layers, rng.choices(free, weights)[0]])


def _without_one(layers: LayerSet, patterns: _Patterns, rng: random.Random) -> LayerSet:
    rest = [tuple(other for other in layers if other != layer) for layer in layers]
    weights = [1 / patterns.weight(layer, fewer) for layer, fewer in zip(layers, rest, strict=True)]
    return rng.choices(rest, weights)[0]
