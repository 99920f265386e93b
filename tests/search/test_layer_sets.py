"""The walk over many sets: which layers it runs, how many layer runs it saves, and how many states it holds."""

import itertools
import random
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_preparation.search.layer_sets import WHOLE_LAYERS, Units, count_passes, walk


class State:
    """What a model has done so far: which of its layers were the donor's. Knows how many of its kind are alive."""

    alive = weakref.WeakSet()  # noqa: RUF012 (shared by all on purpose)
    most = 0

    def __init__(self, kinds):
        self.kinds = kinds
        State.alive.add(self)
        State.most = max(State.most, len(State.alive))


def run(sets, total, units=WHOLE_LAYERS):
    """({set: what it grafts into each layer}, layers run, most states alive)."""
    steps, State.most = [], 0

    def step(layer, part, state):
        assert len(state.kinds) == layer
        steps.append(layer)
        return State((*state.kinds, part))

    found = {}
    for layers, state in walk(sets, total, lambda layer: State(((),) * layer), step, units):
        found[layers] = state.kinds
        del state
    return found, len(steps), State.most


def combinations_of_32(size):
    return list(itertools.combinations(range(32), size))


def random_sets(count, seed=0):
    rng = random.Random(seed)
    return [tuple(sorted(rng.sample(range(32), rng.randint(1, 4)))) for _ in range(count)]


@pytest.mark.parametrize(
    ("sets", "saved"),
    [
        (combinations_of_32(1), 0.45),
        (combinations_of_32(2), 0.62),
        (combinations_of_32(3), 0.71),
        (random_sets(1000), 0.72),
    ],
)
def test_what_is_saved_of_32_layers(sets, saved):
    passes = count_passes(set(sets), 32)
    assert 1 - passes / (32 * len(sets)) == pytest.approx(saved, abs=0.006)
    found, steps, most = run(set(sets), 32)
    assert steps + 32 == passes
    assert found.keys() == set(sets)
    assert most <= max(map(len, sets)) + 1


@pytest.mark.parametrize("units", [WHOLE_LAYERS, Units(2), Units(4, 2)])
@given(st.sets(st.sets(st.integers(0, 7), min_size=1).map(lambda layers: tuple(sorted(layers))), max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_set_is_run_with_its_own_layers_and_no_layer_twice(units, sets):
    """Eight whole layers; four layers with two heads each; two layers with four heads each."""
    total = 8 // units.per_layer
    found, steps, most = run(sets, total, units)
    parts = [range(layer * units.per_layer, (layer + 1) * units.per_layer) for layer in range(total)]
    assert found == {each: tuple(tuple(unit for unit in each if unit in part) for part in parts) for each in sets}
    prefixes = {kinds[:depth] for kinds in found.values() for depth in range(1, total + 1)}
    assert steps == len([prefix for prefix in prefixes if any(prefix)])  # the base's states are given
    assert steps + total == count_passes(sets, total, units)
    assert most <= max(map(len, sets), default=0) + 1
