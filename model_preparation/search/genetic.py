"""A genetic algorithm over sets of layers.

In: a `Space` and `Evaluations`. Out: more evaluations. The first generation is made of the best single layers, of
layers at equal distances, and at random; the next ones by crossing and mutating good sets. Mutation is guided by
patterns: which layers, and pairs of them, good sets have more often than sets at large.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from model_preparation.search.evaluations import Evaluations
from model_preparation.search.layer_sets import LayerSet, normal
from model_preparation.search.space import Space

_ELITE = 0.1  # of a generation goes on unchanged; where candidates race, so many have to be known on all questions
_GOOD = 0.25  # of what is known counts as good where patterns are looked for
_TOURNAMENT = 3  # drawn to become a parent; the best of them does
_CROSSED = 0.9  # chance that a child has two parents
_GUIDED = 0.7  # chance that a layer to add is chosen by patterns
_ATTEMPTS = 20  # at a child that was not evaluated yet


def genetic(
    space: Space, evaluations: Evaluations, rng: random.Random, population: int, generations: int, patience: int
) -> None:
    """Run until `generations` are over, or the best has not become better in `patience` of them.

    Raises:
        BudgetSpent: as `Evaluations.evaluate`.
    """
    if len(space.prior) < space.total:
        evaluations.evaluate(space.singles, max(1, round(_ELITE * population)))
    members = _first_generation(space, evaluations, rng, population)
    best, waited = float("-inf"), 0
    for generation in range(generations):
        ranked = evaluations.evaluate(members, max(1, round(_ELITE * population)))
        known = evaluations.ranked(layers for layers in evaluations.order if layers in space)
        if not ranked or not known:
            return
        found = evaluations.estimate(known[0])
        waited = 0 if found > best else waited + 1
        best = max(best, found)
        is_little_left = evaluations.room is not None and evaluations.room < 2 * population  # that is for refinement
        if waited >= patience or generation == generations - 1 or is_little_left:
            return
        parents = known[:population]
        elite = known[: max(1, round(_ELITE * population))]
        patterns = _Patterns(known)
        children = [_child(space, evaluations, parents, patterns, rng) for _ in range(population - len(elite))]
        members = list(dict.fromkeys([*elite, *children]))


class _Patterns:
    """How much more often layers, and pairs of them, are in good sets than in sets at large."""

    def __init__(self, ranked: Sequence[LayerSet]):
        good = ranked[: max(2, round(_GOOD * len(ranked)))]
        self._good, self._all = _count_patterns(good), _count_patterns(ranked)
        self._sizes = len(good), len(ranked)

    def weight(self, layer: int, layers: LayerSet) -> float:
        """How good a layer looks beside others; 1 where nothing is known."""
        patterns = [(layer,), *(normal([layer, other]) for other in layers)]
        return sum(map(self._ratio, patterns)) / len(patterns)

    def _ratio(self, pattern: LayerSet) -> float:
        good, everywhere = self._sizes
        # One more of each, so that what was never seen is neither 0 nor certain.
        return ((self._good[pattern] + 1) / (good + 1)) / ((self._all[pattern] + 1) / (everywhere + 1))


def _count_patterns(sets: Sequence[LayerSet]) -> Counter[LayerSet]:
    return Counter(pattern for layers in sets for size in (1, 2) for pattern in combinations(layers, size))


def _first_generation(space: Space, evaluations: Evaluations, rng: random.Random, population: int) -> list[LayerSet]:
    sizes = range(max(space.least, 1), space.most + 1)
    gains = space.gains(evaluations)
    best = sorted(gains, key=lambda layer: (-gains[layer], layer))
    found = [normal(best[:size]) for size in sizes]
    promising = best[: 2 * space.most]
    # Of a layer that only helps beside others a single score says nothing, so the best one is tried with many.
    pairs = [pair for pair in space.with_one_more(normal(best[:1])) if pair in space]
    found += space.by_promise(pairs, evaluations)[: population // 2]
    found += [space.spread(size) for size in sizes]
    found = list(dict.fromkeys(layers for layers in found if layers in space))[:population]
    for _ in range(_ATTEMPTS * population):
        if len(found) >= population:
            break
        if rng.random() < 0.5 and len(promising) >= space.most:
            new = normal(rng.sample(promising, rng.choice(sizes)))
        else:
            new = space.draw(rng)
        if new not in found:
            found.append(new)
    return found


def _child(
    space: Space, evaluations: Evaluations, parents: Sequence[LayerSet], patterns: _Patterns, rng: random.Random
) -> LayerSet:
    """A new set, if one is found in some attempts."""
    child = parents[0]
    for _ in range(_ATTEMPTS):
        one, other = (_winner(parents, rng) for _ in range(2))
        child = _cross(one, other, rng) if rng.random() < _CROSSED else one
        child = _mutate(space, child, patterns, rng)
        if not evaluations.is_known(child):
            break
    return child


def _winner(parents: Sequence[LayerSet], rng: random.Random) -> LayerSet:
    return parents[min(rng.randrange(len(parents)) for _ in range(_TOURNAMENT))]  # they are in order, best first


def _cross(one: LayerSet, other: LayerSet, rng: random.Random) -> LayerSet:
    """What both have, and each layer that one of them has with chance 1/2."""
    both = set(one) & set(other)
    return normal([*both, *(layer for layer in normal([*one, *other]) if layer not in both and rng.random() < 0.5)])


def _mutate(space: Space, layers: LayerSet, patterns: _Patterns, rng: random.Random) -> LayerSet:
    """Add, drop or swap a layer, or leave it; then make the set as small and as large as it has to be."""
    change = rng.choice(("add", "drop", "swap", "none"))
    if change in ("drop", "swap") and layers:
        layers = _without_one(layers, patterns, rng)
    if change in ("add", "swap"):
        layers = _with_one(space, layers, patterns, rng)
    while len(layers) > space.most:
        layers = _without_one(layers, patterns, rng)
    while len(layers) < max(1, space.least):
        layers = _with_one(space, layers, patterns, rng)
    return layers


def _with_one(space: Space, layers: LayerSet, patterns: _Patterns, rng: random.Random) -> LayerSet:
    free = [layer for layer in range(space.total) if layer not in layers]
    if not free:
        return layers
    weights = [patterns.weight(layer, layers) if rng.random() < _GUIDED else 1.0 for layer in free]
    return normal([*layers, rng.choices(free, weights)[0]])


def _without_one(layers: LayerSet, patterns: _Patterns, rng: random.Random) -> LayerSet:
    rest = [tuple(other for other in layers if other != layer) for layer in layers]
    weights = [1 / patterns.weight(layer, fewer) for layer, fewer in zip(layers, rest, strict=True)]
    return rng.choices(rest, weights)[0]
