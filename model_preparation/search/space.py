"""The combinations that a search may choose from, and which of them look promising.

In: how many layers there are, how few and how many may be grafted; gains of single layers. Out: combinations, drawn or
in order.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from model_preparation.search.evaluations import BASE, Evaluations
from model_preparation.search.layer_sets import LayerSet, normal


@dataclass(frozen=True)
class Space:
    """Sets of `least` to `most` of `total` layers.

    `prior` are gains of single layers that are known beforehand, by layer.
    """

    total: int
    least: int
    most: int
    prior: Mapping[int, float] = field(default_factory=dict)

    def __contains__(self, layers: LayerSet) -> bool:
        return self.least <= len(layers) <= self.most

    @property
    def count(self) -> int:
        return sum(math.comb(self.total, size) for size in range(self.least, self.most + 1))

    @property
    def singles(self) -> list[LayerSet]:
        return [(layer,) for layer in range(self.total)]

    def all(self) -> Iterator[LayerSet]:
        """Every set, small ones first."""
        for size in range(self.least, self.most + 1):
            yield from itertools.combinations(range(self.total), size)

    def draw(self, rng: random.Random) -> LayerSet:
        """A set at random: first its size, then its layers."""
        return normal(rng.sample(range(self.total), rng.randint(self.least, self.most)))

    def spread(self, size: int) -> LayerSet:
        """Layers at equal distances."""
        return normal([(2 * place + 1) * self.total // (2 * size) for place in range(size)])

    def with_one_more(self, layers: LayerSet) -> list[LayerSet]:
        return [normal([*layers, layer]) for layer in range(self.total) if layer not in layers]

    def neighbours(self, layers: LayerSet) -> list[LayerSet]:
        """The sets that differ by a layer added, dropped or swapped."""
        dropped = [normal(set(layers) - {layer}) for layer in layers]
        swapped = [new for fewer in dropped for new in self.with_one_more(fewer) if new != layers]
        return [new for new in dict.fromkeys([*dropped, *self.with_one_more(layers), *swapped]) if new in self]

    def gains(self, evaluations: Evaluations) -> dict[int, float]:
        """What each single layer gains over the base, by layer: as evaluated, else as known beforehand."""
        base = float(evaluations.base().mean())
        known = {
            layer: evaluations.estimate((layer,)) - base
            for layer in range(self.total)
            if evaluations.is_known((layer,))
        }
        return {**self.prior, **known}

    def by_promise(self, sets: Iterable[LayerSet], evaluations: Evaluations) -> list[LayerSet]:
        """The sets in the order of what their best known part and the single gains of the rest add up to."""
        gains = self.gains(evaluations)
        base = evaluations.estimate(BASE)

        def promise(layers: LayerSet) -> float:
            sums = [base + sum(gains.get(layer, 0.0) for layer in layers)]
            for layer in layers:
                rest = tuple(other for other in layers if other != layer)
                if evaluations.is_known(rest):
                    sums.append(evaluations.estimate(rest) + gains.get(layer, 0.0))
            return sum(sums) / len(sums)

        return sorted(sets, key=lambda layers: (-promise(layers), layers))
