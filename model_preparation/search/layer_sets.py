"""Sets of layers: those that a search may choose, which look promising, and how many of them run together.

Two grafts of one base share all that comes before the first layer in which they differ. So the models of many sets are
the paths of a binary tree (a trie): at each layer the donor's or the base's. `walk` goes through it depth first, runs
each shared layer once, and holds one more hidden state than the largest set has layers.
"""

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from model_preparation.search.candidate_scores import CandidateScores

LayerSet = tuple[int, ...]  # sorted, without repeats
BASE: LayerSet = ()
State = TypeVar("State")


def normal(layers: Iterable[int]) -> LayerSet:
    """The set of these layers."""
    return tuple(sorted(set(layers)))


def names(layers: LayerSet) -> str:
    """The layers as people write them."""
    return " ".join(map(str, layers)) if layers else "base"


def walk(
    sets: Iterable[LayerSet],
    total: int,
    base_state: Callable[[int], State],
    step: Callable[[int, bool, State], State],
) -> Iterator[tuple[LayerSet, State]]:
    """Run the model of every set, shared layers once. Gives each set with the state after its last layer.

    Args:
        sets: distinct sets, none of them empty.
        total: how many layers a model has.
        base_state: gives the base's state before a layer.
        step: gives the state after a layer, from its index, whether it is the donor's, and the state before it.
    """
    by_lowest: dict[int, list[LayerSet]] = {}
    for layers in sorted(sets):
        by_lowest.setdefault(layers[0], []).append(layers)
    for lowest, members in by_lowest.items():
        yield from _descend(members, lowest, total, base_state(lowest), step)


def _descend(
    members: list[LayerSet],
    depth: int,
    total: int,
    state: State,
    step: Callable[[int, bool, State], State],
) -> Iterator[tuple[LayerSet, State]]:
    """`walk` for sets that are alike in all layers before `depth`; `state` comes after those layers."""
    while depth < total:
        grafted = [layers for layers in members if depth in layers]
        others = [layers for layers in members if depth not in layers]
        if grafted and others:
            yield from _descend(grafted, depth + 1, total, step(depth, True, state), step)
            members = others
        state = step(depth, not others, state)
        depth += 1
    yield members[0], state


def count_passes(sets: Iterable[LayerSet], total: int) -> int:
    """How many layers `walk` runs, and once all layers of the base."""
    beginnings = {
        (depth, tuple(layer for layer in layers if layer < depth))
        for layers in sets
        if layers
        for depth in range(layers[0] + 1, total + 1)
    }
    return total + len(beginnings)


def most_passes(count: int, total: int, least: int, most: int, fixed: Collection[int] = ()) -> int:
    """How many layers `walk` runs at most for `count` sets of `least` to `most` layers. For all sets it is exact.

    After each layer there are at most as many models as sets, and as many as a set can have beginnings.
    """
    passes = 0
    for depth in range(1, total + 1):
        free = sum(layer not in fixed for layer in range(depth))
        left = total - len(fixed) - free
        sizes = range(max(1, least - left), most + 1)  # grafted so far, with enough layers left for the rest
        passes += min(count, sum(math.comb(free, size) for size in sizes))
    return passes


@dataclass(frozen=True)
class SearchSpace:
    """All sets of `least` to `most` of `total` layers, without those in `fixed`.

    `prior` has the gains of single layers that are known before the search, by layer.
    """

    total: int
    least: int
    most: int
    prior: Mapping[int, float] = field(default_factory=dict)
    fixed: frozenset[int] = frozenset()

    @property
    def free(self) -> list[int]:
        """The layers that a set may have."""
        return [layer for layer in range(self.total) if layer not in self.fixed]

    def __contains__(self, layers: LayerSet) -> bool:
        return self.least <= len(layers) <= self.most

    @property
    def count(self) -> int:
        return sum(math.comb(len(self.free), size) for size in range(self.least, self.most + 1))

    @property
    def singles(self) -> list[LayerSet]:
        return [(layer,) for layer in self.free]

    def all(self) -> Iterator[LayerSet]:
        """Every set, small ones first."""
        for size in range(self.least, self.most + 1):
            yield from itertools.combinations(self.free, size)

    def draw(self, rng: random.Random) -> LayerSet:
        """A random set: first its size is drawn, then its layers."""
        return normal(rng.sample(self.free, rng.randint(self.least, self.most)))

    def spread(self, size: int) -> LayerSet:
        """Layers at equal distances."""
        free = self.free
        return normal([free[(2 * place + 1) * len(free) // (2 * size)] for place in range(size)])

    def with_one_more(self, layers: LayerSet) -> list[LayerSet]:
        return [normal([*layers, layer]) for layer in self.free if layer not in layers]

    def neighbours(self, layers: LayerSet) -> list[LayerSet]:
        """The sets that differ by one layer added, dropped or swapped."""
        dropped = [normal(set(layers) - {layer}) for layer in layers]
        swapped = [new for fewer in dropped for new in self.with_one_more(fewer) if new != layers]
        return [new for new in dict.fromkeys([*dropped, *self.with_one_more(layers), *swapped]) if new in self]

    def gains(self, scores: "CandidateScores") -> dict[int, float]:
        """What each single layer gains over the base, by layer: from its evaluation, else from `prior`."""
        base = float(scores.base().mean())
        known = (layer for layer in self.free if scores.is_known((layer,)))
        return {**self.prior, **{layer: scores.estimate((layer,)) - base for layer in known}}

    def by_promise(self, sets: Iterable[LayerSet], scores: "CandidateScores") -> list[LayerSet]:
        """The most promising sets first: by the scores of their known parts plus the single gains of the rest."""
        gains = self.gains(scores)
        base = scores.estimate(BASE)

        def promise(layers: LayerSet) -> float:
            sums = [base + sum(gains.get(layer, 0.0) for layer in layers)]
            for layer in layers:
                rest = tuple(other for other in layers if other != layer)
                if scores.is_known(rest):
                    sums.append(scores.estimate(rest) + gains.get(layer, 0.0))
            return sum(sums) / len(sums)

        return sorted(sets, key=lambda layers: (-promise(layers), layers))
