"""Sets of layers or of heads: which are allowed, which look promising, and how their models run together.

The units of a set are its layers or its heads. Two grafts of one base share all layers before the first layer in which
they differ. So the models of many sets form a tree (a trie), and each model is a path from the root to a leaf. At each
layer, a path takes the base's layer, or a layer with the units that the set has in it.
`walk` visits the tree depth first, and runs each shared layer once. If the largest set has n layers, `walk`
holds at most n + 1 hidden states.

Search methods see only the indices of units. `Units` says which layer or head an index means.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from model_preparation.command_line import heads_by_layer, heads_text

if TYPE_CHECKING:
    from model_preparation.search.candidate_scores import CandidateScores

LayerSet = tuple[int, ...]  # indices of units (see `Units`), sorted, without repeats
BASE: LayerSet = ()
State = TypeVar("State")


@dataclass(frozen=True)
class Units:
    """What sets consist of: whole layers, or the donor's query heads. Head h of layer l has the index l * heads + h.

    Attributes:
        heads: how many query heads a layer has; 0 if the units are whole layers.
        kv_heads: how many key/value heads a layer has.
    """

    heads: int = 0
    kv_heads: int = 1

    @property
    def word(self) -> str:
        return "heads" if self.heads else "layers"

    @property
    def per_layer(self) -> int:
        return self.heads or 1

    def layer(self, unit: int) -> int:
        """The layer that a unit is in."""
        return unit // self.per_layer

    def kept_kv_heads(self, found: LayerSet) -> int:
        """How many key/value heads a cache keeps for a set.

        A key/value head that several query heads share counts once.
        """
        if not self.heads:
            return len(found) * self.kv_heads
        return len({unit * self.kv_heads // self.heads for unit in found})

    def written(self, found: LayerSet) -> list[int] | list[str]:
        """A set in the form that files have: [11, 13] for layers, ["13:16", "13:17"] for heads."""
        if not self.heads:
            return list(found)
        return [f"{self.layer(unit)}:{unit % self.heads}" for unit in found]

    def read(self, written: Iterable[int | str]) -> LayerSet:
        """The inverse of `written`. Raises ValueError for a text that is not like "13:16"."""
        if not self.heads:
            return tuple(written)  # type: ignore[arg-type]
        pairs = [tuple(map(int, str(each).split(":"))) for each in written]
        return tuple(layer * self.heads + head for layer, head in pairs)

    def names(self, found: LayerSet) -> str:
        """A set as people write it after --layers or --heads; "base" for the empty set."""
        return names_of(self.written(found)) or "base"


WHOLE_LAYERS = Units()


def names_of(written: Iterable[int | str]) -> str:
    """The output of `Units.written` as people write it: "11 13" for layers, "13:16,17" for heads."""
    words = [str(each) for each in written]
    return heads_text(heads_by_layer(words)) if any(":" in word for word in words) else " ".join(words)


def normal(layers: Iterable[int]) -> LayerSet:
    """These units as a `LayerSet`: sorted, without repeats."""
    return tuple(sorted(set(layers)))


def walk(
    sets: Iterable[LayerSet],
    total: int,
    base_state: Callable[[int], State],
    step: Callable[[int, LayerSet, State], State],
    units: Units = WHOLE_LAYERS,
) -> Iterator[tuple[LayerSet, State]]:
    """Run the model of every set, each shared layer only once. Yields each set with the state after the last layer.

    Args:
        sets: distinct sets, none of them empty.
        total: how many layers a model has.
        base_state: gives the base's state before a layer, from the layer's index.
        step: gives the state after a layer, from the layer's index, the set's units in it, and the state before it.
        units: the units of the sets.
    """
    by_lowest: dict[int, list[LayerSet]] = {}
    for layers in sorted(sets):
        by_lowest.setdefault(units.layer(layers[0]), []).append(layers)
    for lowest, members in by_lowest.items():
        yield from _descend(members, lowest, total, base_state(lowest), step, units)


def _descend(
    members: list[LayerSet],
    depth: int,
    total: int,
    state: State,
    step: Callable[[int, LayerSet, State], State],
    units: Units,
) -> Iterator[tuple[LayerSet, State]]:
    """`walk` for sets that are alike in all layers before `depth`. `state` is their state before layer `depth`."""
    while depth < total:
        alike: dict[LayerSet, list[LayerSet]] = {}
        for layers in members:
            alike.setdefault(tuple(unit for unit in layers if units.layer(unit) == depth), []).append(layers)
        *others, last = sorted(alike, reverse=True)  # the base's layer comes last
        for part in others:
            yield from _descend(alike[part], depth + 1, total, step(depth, part, state), step, units)
        members = alike[last]
        state = step(depth, last, state)
        depth += 1
    yield members[0], state


def count_passes(sets: Iterable[LayerSet], total: int, units: Units = WHOLE_LAYERS) -> int:
    """How many layers run: those that `walk` runs for these sets, plus all layers of the base."""
    beginnings = {
        (depth, tuple(unit for unit in layers if units.layer(unit) < depth))
        for layers in sets
        if layers
        for depth in range(units.layer(layers[0]) + 1, total + 1)
    }
    return total + len(beginnings)


@dataclass(frozen=True)
class SearchSpace:
    """All sets of `least` to `most` units of a model with `total` layers. No unit is in a layer of `fixed`.

    Attributes:
        prior: the gains of single units that are known before the search, by unit.
        units: whether sets consist of layers or of heads.
        most_kv_heads: how many key/value heads a set of heads may need; None if there is no limit.
        seeds: units to try first, the most promising first.
    """

    total: int
    least: int
    most: int
    prior: Mapping[int, float] = field(default_factory=dict)
    fixed: frozenset[int] = frozenset()
    units: Units = WHOLE_LAYERS
    most_kv_heads: int | None = None
    seeds: tuple[int, ...] = ()

    @property
    def free(self) -> list[int]:
        """The units that a set may have."""
        units = range(self.total * self.units.per_layer)
        return [unit for unit in units if self.units.layer(unit) not in self.fixed]

    def fits(self, layers: LayerSet) -> bool:
        """Whether a set has few enough units and key/value heads. If a set fits, every subset of it fits."""
        return len(layers) <= self.most and (
            self.most_kv_heads is None or self.units.kept_kv_heads(layers) <= self.most_kv_heads
        )

    def __contains__(self, layers: LayerSet) -> bool:
        return self.least <= len(layers) and self.fits(layers)

    @property
    def count(self) -> int:
        sizes, free = range(self.least, self.most + 1), len(self.free)
        if self.most_kv_heads is None:
            return sum(math.comb(free, size) for size in sizes)
        sharing = self.units.heads // self.units.kv_heads

        def filling(groups: int, size: int) -> int:
            """How many sets of `size` heads need all of `groups` key/value heads, by inclusion and exclusion."""
            return sum(
                (-1) ** gone * math.comb(groups, gone) * math.comb((groups - gone) * sharing, size)
                for gone in range(groups + 1)
            )

        return sum(
            math.comb(free // sharing, groups) * filling(groups, size)
            for size in sizes
            for groups in range(1, min(size, self.most_kv_heads) + 1)
        )

    def most_passes(self, count: int, least: int, most: int) -> int:
        """How many layers `walk` runs at most for `count` sets of `least` to `most` units.

        The number is exact if these are all such sets. `walk` runs a layer at most once for each set, and at most once
        for each possible choice of units up to that layer.
        """
        passes, per_layer = 0, self.units.per_layer
        for depth in range(1, self.total + 1):
            free = per_layer * sum(layer not in self.fixed for layer in range(depth))
            left = per_layer * (self.total - len(self.fixed)) - free
            sizes = range(max(1, least - left), most + 1)  # units so far, if later layers have enough for the rest
            passes += min(count, sum(math.comb(free, size) for size in sizes))
        return passes

    @property
    def singles(self) -> list[LayerSet]:
        return [(layer,) for layer in self.free]

    @property
    def seed_sets(self) -> list[LayerSet]:
        """The first 1, 2, ... of `seeds` together, then each seed alone. Sets outside the space are left out."""
        first = [normal(self.seeds[:size]) for size in range(1, self.most + 1)]
        return [each for each in dict.fromkeys([*first, *((seed,) for seed in self.seeds)]) if each in self]

    def all(self) -> Iterator[LayerSet]:
        """Every set, small ones first."""
        for size in range(self.least, self.most + 1):
            yield from filter(self.fits, itertools.combinations(self.free, size))

    def draw(self, rng: random.Random) -> LayerSet:
        """A random set: first its size is drawn, then its units."""
        return normal(rng.sample(self.free, rng.randint(self.least, self.most)))

    def spread(self, size: int) -> LayerSet:
        """A set of `size` units at equal distances."""
        free = self.free
        return normal([free[(2 * place + 1) * len(free) // (2 * size)] for place in range(size)])

    def with_one_more(self, layers: LayerSet) -> list[LayerSet]:
        return [new for new in (normal([*layers, unit]) for unit in self.free if unit not in layers) if self.fits(new)]

    def neighbours(self, layers: LayerSet) -> list[LayerSet]:
        """The sets that differ from this one by one unit added, dropped or swapped."""
        dropped = [normal(set(layers) - {layer}) for layer in layers]
        swapped = [new for fewer in dropped for new in self.with_one_more(fewer) if new != layers]
        return [new for new in dict.fromkeys([*dropped, *self.with_one_more(layers), *swapped]) if new in self]

    def gains(self, scores: "CandidateScores") -> dict[int, float]:
        """The gain of each single unit over the base, by unit: from the unit's evaluation, else from `prior`."""
        base = float(scores.base().mean())
        known = (layer for layer in self.free if scores.is_known((layer,)))
        return {**self.prior, **{layer: scores.estimate((layer,)) - base for layer in known}}

    def by_promise(self, sets: Iterable[LayerSet], scores: "CandidateScores") -> list[LayerSet]:
        """Sort sets, the most promising first."""
        gains = self.gains(scores)
        base = scores.estimate(BASE)

        def promise(layers: LayerSet) -> float:
            """The mean of several guesses: the score of a known subset, plus the gains of the set's other units."""
            sums = [base + sum(gains.get(layer, 0.0) for layer in layers)]
            for layer in layers:
                rest = tuple(other for other in layers if other != layer)
                if scores.is_known(rest):
                    sums.append(scores.estimate(rest) + gains.get(layer, 0.0))
            return sum(sums) / len(sums)

        return sorted(sets, key=lambda layers: (-promise(layers), layers))
