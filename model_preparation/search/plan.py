"""The plan of a search, as lines to print, and the highest cost that the search can have.

Races, repeats and an early stop make the cost lower. Failures, which make it higher, are not counted: a failed
evaluation is tried again, and an interrupted search runs the base again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.filesize import decimal

from model_preparation.errors import SurgeryError
from model_preparation.llamba.cache_bytes import cache_bytes
from model_preparation.search.layer_sets import LayerSet, SearchSpace, names_of
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import SearchSettings
from model_preparation.search.shared_scoring import count_tokens, hidden_states_bytes

_MOST_TRIED = 1_000_000  # combinations of heads that `exhaustive` accepts; all of them are in memory


@dataclass(frozen=True)
class Cost:
    """How many combinations are evaluated, and how many layer passes this takes."""

    evaluations: int
    passes: int


@dataclass(frozen=True)
class Bounds:
    """The highest cost of a search.

    Attributes:
        search: the cost of the whole search; or, if there is a `step`, of the part before refinement.
        step: the cost of one step of refinement. Refinement ends when a step finds nothing better.
        evaluations: how many combinations the whole search evaluates.
        everything: the cost of all combinations of the space together.
        before: how many sets outside the space are evaluated before the first set of the space, even if the budget is
            small. They are larger sets for `removal` and `ratio`, and smaller sets for the other methods.
    """

    search: Cost
    step: Cost | None
    evaluations: int
    everything: Cost
    before: int = 0


def bounds(space: SearchSpace, settings: SearchSettings) -> Bounds:
    """The highest cost of a search of this space."""
    total, free = space.total, len(space.free)
    everything = Cost(space.count, total + space.most_passes(space.count, space.least, space.most))
    budget = math.inf if settings.budget_evaluations is None else settings.budget_evaluations
    if settings.method in ("singles", "exhaustive"):
        count = int(min(budget, space.count))
        found = Cost(count, total + space.most_passes(count, space.least, space.most))
        return Bounds(found, None, count, everything)

    # A set that lacks one layer of a larger set is like the larger set up to that layer.
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
    batches = [(singles, 1)]  # (how many combinations are evaluated together, how many units the largest has)
    if is_genetic:
        batches += [(settings.population, space.most)] * settings.generations
        before = singles if space.least > 1 else 0
    else:
        batches += [(min(width * (free - size + 1), math.comb(free, size)), size) for size in range(2, space.most + 1)]
        # With a small budget, only `width` sets of each smaller size are evaluated.
        smaller = sum(min(width, math.comb(free, size)) for size in range(2, space.least))
        before = singles + smaller if space.least > 1 else 0
    # These methods also evaluate sets that are too small for the space. ga evaluates single layers, the other
    # methods evaluate sets of all smaller sizes.
    outside = range(1, min(2, space.least) if is_genetic else space.least)
    limit = int(min(budget, space.count + sum(math.comb(free, size) for size in outside)))
    asked = sum(count for count, _ in batches)
    early = min(asked, limit)
    passes = total + sum(space.most_passes(count, 1, size) for count, size in batches)
    first = Cost(early, min(passes, _in_any_order(early, singles, space)))
    if settings.method == "greedy":
        return Bounds(first, None, early, everything, before)
    if limit <= asked:  # then `limit` covers refinement too
        return Bounds(Cost(limit, _in_any_order(limit, singles, space)), None, limit, everything, before)
    return Bounds(first, _refinement(space), limit, everything, before)


def _refinement(space: SearchSpace) -> Cost:
    """The highest cost of one step of refinement, from a set of the size that has the most neighbours."""

    def neighbours(size: int) -> int:
        free = len(space.free) - size
        return size * free + size * (size > space.least) + free * (size < space.most)

    count = max(map(neighbours, range(space.least, space.most + 1)))
    return Cost(count, space.most_passes(count, space.least, space.most))


def _in_any_order(count: int, singles: int, space: SearchSpace) -> int:
    """The layer passes of `count` combinations: up to `singles` single units, then sets that share no layers."""
    first = min(count, singles)
    return space.total + space.most_passes(first, 1, 1) + (count - first) * space.total


def space_of(setup: ScoringSetup, gains: Mapping[int, float], seeds: Sequence[int]) -> SearchSpace:
    """The sets to search: those of the wanted sizes whose cache is within the budget.

    Args:
        gains, seeds: as `known_units` reads them from the prior file.

    Raises:
        SurgeryError: if there is no set, or if there are too many to try.
    """
    settings, pair = setup.settings, setup.pair
    units, least, most = pair.units, settings.min_layers, settings.most
    space = SearchSpace(pair.layers, least, most, gains, pair.fixed, units, None, tuple(seeds))
    if units.heads and most > (free := len(space.free)):
        raise SurgeryError(f"max_heads is {most}, but there are {free} heads to choose from. Give --max_heads {free}.")
    if settings.max_cache_bytes is not None and settings.at_tokens is not None:
        # Each whole layer changes the cache by the same amount, so all sizes between two that fit also fit. Each head
        # only adds to the cache.
        sets: dict[int, LayerSet] = {size: tuple(range(size)) for size in range(least, most + 1)}
        needs = {size: _cache_bytes(setup, units.kept_kv_heads(each), size) for size, each in sets.items()}
        fits = [size for size, size_bytes in needs.items() if size_bytes <= settings.max_cache_bytes]
        if not fits:
            raise SurgeryError(
                f"A combination of {least} to {most} {units.word} has a cache of at least {min(needs.values()):,} "
                f"bytes after {settings.at_tokens:,} tokens, but max_cache_bytes is {settings.max_cache_bytes:,}. "
                f"Give a larger --max_cache_bytes, or other numbers of {units.word}."
            )
        space = replace(space, least=fits[0], most=fits[-1])
        if units.heads:
            kept = range(1, pair.layers * units.kv_heads + 1)
            most_kept = max(each for each in kept if _cache_bytes(setup, each, 0) <= settings.max_cache_bytes)
            space = replace(space, most_kv_heads=most_kept)
    if units.heads and settings.method == "exhaustive" and space.count > _MOST_TRIED:
        raise SurgeryError(
            f"There are {space.count:,} combinations of heads, but --method exhaustive takes {_MOST_TRIED:,} at most. "
            "Give a smaller --max_heads, or another --method."
        )
    return space


def _cache_bytes(setup: ScoringSetup, kv_heads: int, layers: int) -> int:
    """The cache's bytes after `at_tokens` tokens, for a set with `kv_heads` key/value heads and `layers` layers."""
    settings, pair = setup.settings, setup.pair
    states = cache_bytes(pair.model.config, len(pair.fixed) + (0 if pair.units.heads else layers), 0, pair.model.dtype)
    return states + (settings.at_tokens or 0) * pair.kv_bytes_per_token(kv_heads)


def describe(setup: ScoringSetup, space: SearchSpace) -> list[str]:
    """The plan of a search, as lines to print."""
    settings, questions, donor = setup.settings, setup.questions, setup.planned.donor
    tokens = count_tokens(questions)
    size = hidden_states_bytes(setup)
    in_file = max(0, size - settings.memory_bytes)
    return [
        f"Base         {setup.planned.base.folder}"
        + (f", with layers {names_of(sorted(space.fixed))} grafted" if space.fixed else ""),
        f"Donor        {donor.metadata['source']['id']} (layers in {donor.folder})",
        f"Questions    {len(questions.questions):,} of {', '.join(settings.all_tasks)}, {tokens:,} tokens with padding",
        f"Memory       {decimal(size)} for the base's hidden states before each of {space.total} layers"
        + (f", of which up to {decimal(in_file)} in a file in {settings.folder}" if in_file else "")
        + f"; at most {min(space.most, space.total) + 1} more hidden states of {decimal(size // space.total)} each",
        f"Method       {settings.method}, {space.least} to {space.most} of {len(space.free)} {space.units.word}"
        + (", candidates race" if settings.races else "")
        + f"; maximises {settings.objective}",
        *_describe_cache(setup, space),
        *describe_cost(bounds(space, settings), settings, space.total),
    ]


def _describe_cache(setup: ScoringSetup, space: SearchSpace) -> list[str]:
    """The line on the cache's budget: which sizes it leaves out, and how many bytes the largest candidate needs."""
    settings, units = setup.settings, space.units
    if settings.max_cache_bytes is None or settings.at_tokens is None:
        return []
    asked = range(settings.min_layers, settings.most + 1)
    left_out = [size for size in asked if not space.least <= size <= space.most]
    layers = f"; left out: {', '.join(map(str, left_out))} {units.word}" if left_out else "; all sizes fit"
    if space.most_kv_heads is not None:
        layers = f"; a combination may need at most {space.most_kv_heads} key/value heads" + layers
    most = {size: size * units.kv_heads for size in (space.least, space.most)}
    if units.heads:
        most = {space.most: min(space.most, space.most_kv_heads or 0)}
    largest = max(_cache_bytes(setup, kv_heads, size) for size, kv_heads in most.items())
    return [
        f"Cache        at most {settings.max_cache_bytes:,} bytes after {settings.at_tokens:,} tokens; "
        f"the largest candidate needs {largest:,}{layers}"
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
        + f"; without sharing, {evaluations:,} combination{'s' * (evaluations != 1)} would take {alone:,}"
        + (f": {'at least ' if most else ''}{1 - passes / alone:.0%} saved" if passes < alone else "")
        + (", and races save more" if settings.races else ""),
    ]
    if not is_whole and passes + (step.passes if step else 0) >= found.everything.passes:
        together = "the only combination takes" if count == "1" else f"all {count} combinations together take only"
        lines.append(
            f"Advice       {together} {found.everything.passes:,} layer passes: use --method exhaustive, or limit the "
            "search by --budget_evaluations"
        )
    return lines
