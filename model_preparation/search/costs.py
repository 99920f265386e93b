"""What a search costs at most, as far as that is known before it starts.

In: a `Space` and a `Search`. Out: `Bounds` on the combinations that are evaluated and on the layers that are run.
Races, repeats and stopping early only make it less. Not counted is what trouble costs: an evaluation that fails is
tried again, and an interrupted search runs the base again.
"""

import math
from dataclasses import dataclass

from model_preparation.search.layer_sets import most_passes
from model_preparation.search.methods import Search
from model_preparation.search.space import Space

Batch = tuple[int, int]  # how many combinations are asked for at once, and how many layers the largest has


@dataclass(frozen=True)
class Cost:
    """Combinations evaluated, and layers run."""

    evaluations: int
    passes: int


@dataclass(frozen=True)
class Bounds:
    """What a search takes at most.

    Attributes:
        search: all of it; or, where `step` is given, what comes before refinement.
        step: of refinement, which goes on as long as it finds something better.
        evaluations: of the whole search.
        everything: what all combinations of the space take at once.
        before: how many smaller sets are evaluated before the first of the space, however small the budget.
    """

    search: Cost
    step: Cost | None
    evaluations: int
    everything: Cost
    before: int = 0


def bounds(space: Space, search: Search) -> Bounds:
    """What a search of a space takes at most."""
    total = space.total
    everything = Cost(space.count, total + most_passes(space.count, total, space.least, space.most))
    budget = math.inf if search.budget_evaluations is None else search.budget_evaluations
    if search.method in ("singles", "exhaustive"):
        count = int(min(budget, space.count))
        found = Cost(count, total + most_passes(count, total, space.least, space.most))
        return Bounds(found, None, count, everything)

    singles = 0 if len(space.prior) == total else total  # evaluated first
    before = _smaller_first(space, search, singles)
    batches = [(singles, 1), *(_generations(space, search) if search.method == "ga" else _sizes(space, search))]
    # These methods may go beyond the space for what layers gain, beam and greedy from one layer to the next.
    smaller = range(1, space.least) if search.method != "ga" else range(1, min(2, space.least))
    limit = int(min(budget, space.count + sum(math.comb(total, size) for size in smaller)))
    asked = sum(count for count, _ in batches)
    early = min(asked, limit)
    passes = total + sum(most_passes(count, total, 1, size) for count, size in batches)
    first = Cost(early, min(passes, _in_any_order(early, singles, total)))
    if search.method == "greedy":
        return Bounds(first, None, early, everything, before)
    if limit <= asked:  # what refinement asks for is among that
        return Bounds(Cost(limit, _in_any_order(limit, singles, total)), None, limit, everything, before)
    return Bounds(first, _refinement(space), limit, everything, before)


def _generations(space: Space, search: Search) -> list[Batch]:
    return [(search.options.population, space.most)] * search.options.generations


def _smaller_first(space: Space, search: Search, singles: int) -> int:
    """Single layers; then beam and greedy fill their width on each size, and leave room for the sizes after it."""
    if space.least == 1 or search.method == "ga":
        return 0 if space.least == 1 else singles
    width = search.options.beam_width if search.method == "beam" else 1
    return singles + sum(min(width, math.comb(space.total, size)) for size in range(2, space.least))


def _sizes(space: Space, search: Search) -> list[Batch]:
    width = search.options.beam_width if search.method == "beam" else 1
    total = space.total
    return [(min(width * (total - size + 1), math.comb(total, size)), size) for size in range(2, space.most + 1)]


def _refinement(space: Space) -> Cost:
    """A step from the size that has most neighbours."""

    def neighbours(size: int) -> int:
        free = space.total - size
        return size * free + size * (size > space.least) + free * (size < space.most)

    count = max(map(neighbours, range(space.least, space.most + 1)))
    return Cost(count, most_passes(count, space.total, space.least, space.most))


def _in_any_order(count: int, singles: int, total: int) -> int:
    """Layer passes of so many combinations, single layers first, if none shares anything with another."""
    first = min(count, singles)
    return total + most_passes(first, total, 1, 1) + (count - first) * total
