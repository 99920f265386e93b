"""What a search will do, in lines to print, and what it costs at most.

Races, repeats and an early stop only make it cheaper. Trouble is not counted: a failed evaluation is tried again, and
an interrupted search runs the base again.
"""

import math
from dataclasses import dataclass

from rich.filesize import decimal

from model_preparation.errors import SurgeryError
from model_preparation.llamba.cache_llamba import cache_bytes
from model_preparation.search.cached_scoring import count_tokens, hidden_states_bytes
from model_preparation.search.layer_sets import SearchSpace, most_passes, names, normal
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import SearchSettings

Batch = tuple[int, int]  # how many combinations are evaluated together, and how many layers the largest has


@dataclass(frozen=True)
class Cost:
    """Combinations that are evaluated, and layers that are run."""

    evaluations: int
    passes: int


@dataclass(frozen=True)
class Bounds:
    """What a search takes at most.

    Attributes:
        search: the whole search; or, if there is a `step`, what comes before refinement.
        step: one step of refinement. Refinement ends when a step finds nothing better.
        evaluations: of the whole search.
        everything: what all combinations of the space take together.
        before: how many smaller sets (larger ones by removal) are evaluated before the first set of the space, even if
            the budget is small.
    """

    search: Cost
    step: Cost | None
    evaluations: int
    everything: Cost
    before: int = 0


def bounds(space: SearchSpace, settings: SearchSettings) -> Bounds:
    """What a search of a space takes at most."""
    total, free, fixed = space.total, len(space.free), space.fixed
    everything = Cost(space.count, total + most_passes(space.count, total, space.least, space.most, fixed))
    budget = math.inf if settings.budget_evaluations is None else settings.budget_evaluations
    if settings.method in ("singles", "exhaustive"):
        count = int(min(budget, space.count))
        found = Cost(count, total + most_passes(count, total, space.least, space.most, fixed))
        return Bounds(found, None, count, everything)

    # The sets that lack one layer each of a larger set are alike up to that layer.
    each_without = {size: sum(min(size, depth + 1) for depth in range(1, total + 1)) for size in range(total + 1)}
    if settings.method == "removal":
        steps = range(space.least + 1, free + 1)
        count = int(min(budget, sum(steps) + (space.most == free)))
        passes = 2 * total + sum(each_without[size] for size in steps)
        found = Cost(count, min(passes, total + count * total))
        return Bounds(found, None, count, everything, before=sum(range(space.most + 2, free + 1)))
    if settings.method == "ratio":
        sizes = space.most - space.least + 1
        count = int(min(budget, free + sizes))
        passes = (1 + sizes) * total + each_without[free]
        found = Cost(count, min(passes, total + count * total))
        return Bounds(found, None, count, everything, before=0 if space.least < free <= space.most + 1 else free)

    is_genetic = settings.method == "ga"
    width = settings.beam_width if settings.method == "beam" else 1
    singles = 0 if len(space.prior) == free else free  # evaluated first
    batches = [(singles, 1)]
    if is_genetic:
        batches += [(settings.population, space.most)] * settings.generations
        before = singles if space.least > 1 else 0
    else:
        batches += [(min(width * (free - size + 1), math.comb(free, size)), size) for size in range(2, space.most + 1)]
        # Each smaller size is filled to the width, and leaves room for the sizes after it.
        smaller = sum(min(width, math.comb(free, size)) for size in range(2, space.least))
        before = singles + smaller if space.least > 1 else 0
    # These methods go beyond the space: for what layers gain, and beam and greedy from each size to the next.
    outside = range(1, min(2, space.least) if is_genetic else space.least)
    limit = int(min(budget, space.count + sum(math.comb(free, size) for size in outside)))
    asked = sum(count for count, _ in batches)
    early = min(asked, limit)
    passes = total + sum(most_passes(count, total, 1, size) for count, size in batches)
    first = Cost(early, min(passes, _in_any_order(early, singles, total)))
    if settings.method == "greedy":
        return Bounds(first, None, early, everything, before)
    if limit <= asked:  # this covers what refinement evaluates
        return Bounds(Cost(limit, _in_any_order(limit, singles, total)), None, limit, everything, before)
    return Bounds(first, _refinement(space), limit, everything, before)


def _refinement(space: SearchSpace) -> Cost:
    """One step, from the size that has the most neighbours."""

    def neighbours(size: int) -> int:
        free = len(space.free) - size
        return size * free + size * (size > space.least) + free * (size < space.most)

    count = max(map(neighbours, range(space.least, space.most + 1)))
    return Cost(count, most_passes(count, space.total, space.least, space.most, space.fixed))


def _in_any_order(count: int, singles: int, total: int) -> int:
    """Layer passes of `count` combinations, single layers first, if none shares a layer with another."""
    first = min(count, singles)
    return total + most_passes(first, total, 1, 1) + (count - first) * total


def sizes_in_budget(setup: ScoringSetup) -> tuple[int, int]:
    """The fewest and the most layers of a combination whose cache is within the budget.

    Raises:
        SurgeryError: if no size is.
    """
    settings, model = setup.settings, setup.pair.model
    least, most = settings.min_layers, settings.most_layers
    if settings.max_cache_bytes is None or settings.at_tokens is None:
        return least, most
    tokens, fixed = settings.at_tokens, len(setup.pair.fixed)
    needs = {size: cache_bytes(model.config, fixed + size, tokens, model.dtype) for size in range(least, most + 1)}
    fits = [size for size, size_bytes in needs.items() if size_bytes <= settings.max_cache_bytes]
    if not fits:
        raise SurgeryError(
            f"A combination of {least} to {most} layers has a cache of at least {min(needs.values()):,} bytes after "
            f"{settings.at_tokens:,} tokens, and max_cache_bytes is {settings.max_cache_bytes:,}. "
            "Give more --max_cache_bytes, or other numbers of layers."
        )
    return fits[0], fits[-1]  # each layer changes the cache alike, so all sizes between them fit too


def describe(setup: ScoringSetup, space: SearchSpace) -> list[str]:
    """The plan."""
    settings, questions, donor = setup.settings, setup.questions, setup.planned.donor
    tokens = count_tokens(questions)
    size = hidden_states_bytes(setup)
    in_file = max(0, size - settings.memory_bytes)
    return [
        f"Base         {setup.planned.base.folder}"
        + (f", with layers {names(normal(space.fixed))} grafted" if space.fixed else ""),
        f"Donor        {donor.metadata['source']['id']} (layers in {donor.folder})",
        f"Questions    {len(questions.questions):,} of {', '.join(settings.all_tasks)}, {tokens:,} tokens with padding",
        f"Memory       {decimal(size)} for the base's hidden states before each of {space.total} layers"
        + (f", of which up to {decimal(in_file)} in a file in {settings.folder}" if in_file else "")
        + f"; at most {space.most + 1} more states of {decimal(size // space.total)}",
        f"Method       {settings.method}, {space.least} to {space.most} of {len(space.free)} layers"
        + (", candidates race" if settings.races else "")
        + f"; maximises {settings.objective}",
        *_describe_cache(setup, space),
        *describe_cost(bounds(space, settings), settings, space.total),
    ]


def _describe_cache(setup: ScoringSetup, space: SearchSpace) -> list[str]:
    """What the budget of the cache leaves of the space."""
    settings, model = setup.settings, setup.pair.model
    if settings.max_cache_bytes is None or settings.at_tokens is None:
        return []
    asked = range(settings.min_layers, settings.most_layers + 1)
    left_out = [size for size in asked if not space.least <= size <= space.most]
    layers = f"; left out: {', '.join(map(str, left_out))} layers" if left_out else "; all sizes fit"
    largest = max(
        cache_bytes(model.config, len(space.fixed) + size, settings.at_tokens, model.dtype)
        for size in (space.least, space.most)
    )
    return [
        f"Cache        at most {settings.max_cache_bytes:,} bytes after {settings.at_tokens:,} tokens; "
        f"the largest candidate has {largest:,}{layers}"
    ]


def describe_cost(found: Bounds, settings: SearchSettings, total: int) -> list[str]:
    """The lines on evaluations and layer passes."""
    evaluations, passes, step = found.search.evaluations, found.search.passes, found.step
    alone = evaluations * total
    is_whole = settings.method in ("singles", "exhaustive") and evaluations == found.everything.evaluations
    most = "" if is_whole and not settings.races else "at most "
    later = f", then at most {step.evaluations:,} in each step of refinement" if step else ""
    count = f"{found.everything.evaluations:,}"
    evaluated = f", of which {most}{evaluations:,} {'is' if evaluations == 1 else 'are'} evaluated"
    if found.before:
        other = "larger" if settings.method in ("removal", "ratio") else "smaller"
        evaluated = f"; {most}{evaluations:,} evaluations, {other} sets on the way included"
    lines = [
        f"Candidates   {count}{evaluated}{later}",
        f"Cost         {most}{passes:,} layer passes"
        + (f", and {step.passes:,} in each step of refinement" if step else "")
        + f"; alone, {evaluations:,} combination{'s' * (evaluations != 1)} would take {alone:,}: "
        + f"{'at least ' if most else ''}{max(0.0, 1 - passes / alone):.0%} saved"
        + (", and more by races" if settings.races else ""),
    ]
    if not is_whole and passes + (step.passes if step else 0) >= found.everything.passes:
        together, left = f"all {count} combinations together take", " and leave none out"
        if count == "1":
            together, left = "the only combination takes", ""
        lines.append(
            f"Advice       {together} {found.everything.passes:,} layer passes{left}: "
            "use --method exhaustive, or a --budget_evaluations"
        )
    return lines
