"""Combinations of layers, and the order in which many of them are run so that what they share runs once.

In: sets of layers. Out: a walk over the tree of their models. Two models share what comes before the first layer in
which they differ, so the models of many sets are the paths of a binary tree: at each layer the donor's or the base's.
Walked depth first, the tree needs the hidden states of one more layer boundary than its largest set has layers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

LayerSet = tuple[int, ...]  # sorted, without repeats; () is the base
State = TypeVar("State")


def walk(
    sets: Iterable[LayerSet],
    total: int,
    boundary: Callable[[int], State],
    step: Callable[[int, bool, State], State],
) -> Iterator[tuple[LayerSet, State]]:
    """Run the model of every set, what several share once; gives each with the state after its last layer.

    Args:
        sets: distinct, none of them empty.
        total: layers of a model.
        boundary: the base's state before a layer.
        step: the state after a layer, given its index, whether it is the donor's, and the state before it.
    """
    by_lowest: dict[int, list[LayerSet]] = {}
    for layers in sorted(sets):
        by_lowest.setdefault(layers[0], []).append(layers)
    for lowest, members in by_lowest.items():
        yield from _descend(members, lowest, total, boundary(lowest), step)


def _descend(
    members: list[LayerSet],
    depth: int,
    total: int,
    state: State,
    step: Callable[[int, bool, State], State],
) -> Iterator[tuple[LayerSet, State]]:
    """`walk` for sets that are alike in all layers before `depth`, after which `state` is."""
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
    """How many layers `walk` runs, and those of the base once."""
    prefixes = {
        (depth, tuple(layer for layer in layers if layer < depth))
        for layers in sets
        if layers
        for depth in range(layers[0] + 1, total + 1)
    }
    return total + len(prefixes)


def most_passes(count: int, total: int, least: int, most: int) -> int:
    """How many layers `walk` runs at most for `count` sets of `least` to `most` layers; for all of them, just as many.

    After each layer there are no more models than sets, nor than beginnings that a set can have.
    """
    passes = 0
    for depth in range(1, total + 1):
        sizes = range(max(1, least - (total - depth)), most + 1)  # grafted so far, with enough layers left for the rest
        passes += min(count, sum(math.comb(depth, size) for size in sizes))
    return passes


def normal(layers: Iterable[int]) -> LayerSet:
    """The set of these layers."""
    return tuple(sorted(set(layers)))
