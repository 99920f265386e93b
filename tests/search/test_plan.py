"""A search costs no more than its plan says. Where the plan can be exact, it is exact."""

import contextlib
import itertools

import pytest

from model_preparation.search import methods
from model_preparation.search.candidate_scores import BudgetSpent
from model_preparation.search.layer_sets import SearchSpace, Units, count_passes
from model_preparation.search.methods import METHODS
from model_preparation.search.plan import bounds, describe_cost
from model_preparation.search.settings import SearchSettings
from tests.search.planted import TOTAL, draw_sets, make_scores

PRIOR = {layer: (0.1 if layer in (3, 7, 5) else 0.0) for layer in range(TOTAL)}
SEARCHES = [("exhaustive", (1, 2, {}))]
SEARCHES += itertools.product(("greedy", "beam", "ga", "removal", "ratio"), [(1, 2, {}), (1, 3, PRIOR), (2, 4, {})])
SMALL = {"population": 10, "generations": 3, "patience": 3, "beam_width": 3}


def space_of(settings, prior=None):
    return SearchSpace(TOTAL, settings.min_layers, settings.most, prior or {})


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 3), (2, 3), (3, 3), (2, TOTAL)])
def test_all_sets_take_as_many_passes_as_is_said(least, most):
    sets = [layers for size in range(least, most + 1) for layers in itertools.combinations(range(TOTAL), size)]
    assert TOTAL + SearchSpace(TOTAL, least, most).most_passes(len(sets), least, most) == count_passes(sets, TOTAL)
    fixed = frozenset({1, 4})
    sets = [layers for layers in sets if not fixed & {*layers}]
    assert TOTAL + SearchSpace(TOTAL, least, most, {}, fixed).most_passes(len(sets), least, most) == count_passes(
        sets, TOTAL
    )


@pytest.mark.parametrize("fixed", [frozenset(), frozenset({1})])
@pytest.mark.parametrize("most_kv_heads", [None, 1, 2])
def test_sets_of_heads_are_counted(fixed, most_kv_heads):
    """Three layers have four query heads each. Two query heads share a key/value head."""
    units = Units(4, 2)
    space = SearchSpace(3, 1, 3, {}, fixed, units, most_kv_heads)
    heads = [(layer, head) for layer in range(3) for head in range(4) if layer not in fixed]
    sets = [each for size in (1, 2, 3) for each in itertools.combinations(heads, size)]
    if most_kv_heads is not None:
        sets = [each for each in sets if len({(layer, head // 2) for layer, head in each}) <= most_kv_heads]
    found = list(space.all())
    assert [tuple((unit // 4, unit % 4) for unit in each) for each in found] == sets
    assert space.count == len(sets)
    passes = 3 + space.most_passes(len(sets), 1, 3)
    assert count_passes(found, 3, units) <= passes
    assert most_kv_heads is not None or count_passes(found, 3, units) == passes


@pytest.mark.parametrize("count", [1, 5, 40, 200])
def test_some_sets_take_no_more_passes_than_is_said(count):
    for seed in range(5):
        sets = draw_sets(count, seed)
        assert count_passes(sets, TOTAL) <= TOTAL + SearchSpace(TOTAL, 1, 4).most_passes(len(sets), 1, 4)
    first = list(itertools.islice(itertools.combinations(range(TOTAL), 4), count))
    assert count_passes(first, TOTAL) <= TOTAL + SearchSpace(TOTAL, 4, 4).most_passes(count, 4, 4)


def taken(folder, changes, prior, monkeypatch):
    """The statistics before refinement and at the end, and how many steps refinement had."""
    scores = make_scores(folder, 32, **changes)
    settings = SearchSettings(folder, **changes)
    before, steps = [], []
    refine, evaluate = methods.refine, scores.evaluate

    def noted(space, scores):
        before.append(scores.statistics())
        monkeypatch.setattr(scores, "evaluate", lambda *given: steps.append(given) or evaluate(*given))
        refine(space, scores)

    monkeypatch.setattr(methods, "refine", noted)
    try:
        METHODS[settings.method](space_of(settings, prior), scores, settings)
    except BudgetSpent:
        assert settings.budget_evaluations is not None
    scores.journal.close()
    statistics = scores.statistics()
    return (before or [statistics])[0], statistics, len(steps)


@pytest.mark.parametrize("budget", [None, 7, 40])
@pytest.mark.parametrize(("method", "sizes"), SEARCHES)
def test_a_search_takes_no_more_than_its_plan_says(method, sizes, budget, tmp_path, monkeypatch):
    least, most, prior = sizes
    sizes = {"min_layers": least, "max_layers": most}
    changes = {"method": method, "budget_evaluations": budget, "race": False, **sizes, **SMALL}  # races make it less
    settings = SearchSettings(tmp_path, **changes)
    found = bounds(space_of(settings, prior), settings)
    before, whole, steps = taken(tmp_path, changes, prior, monkeypatch)
    assert whole["evaluations"] <= found.evaluations
    if found.step is None:
        assert whole["evaluations"] <= found.search.evaluations
        assert whole["layer_passes"] <= found.search.passes + 0.01
    else:
        assert before["evaluations"] <= found.search.evaluations
        assert before["layer_passes"] <= found.search.passes + 0.01
        assert whole["evaluations"] <= found.search.evaluations + steps * found.step.evaluations
        assert whole["layer_passes"] <= found.search.passes + steps * found.step.passes + 0.01
        assert steps > 0 or budget is not None
    if method == "exhaustive" and budget is None:
        assert whole["layer_passes"] == pytest.approx(found.search.passes)
        assert whole["evaluations"] == found.everything.evaluations


def test_the_plan_says_where_all_combinations_cost_no_more():
    def lines(method, most, budget=None):
        settings = SearchSettings(".", method=method, max_layers=most, budget_evaluations=budget)
        return "\n".join(describe_cost(bounds(space_of(settings), settings), settings, TOTAL))

    assert "all 78 combinations together take only 376 layer passes" in lines("ga", 2)
    assert "at most 78 are evaluated" in lines("ga", 2)
    assert "--method exhaustive" in lines("ga", 2)
    for plan in (lines("ga", 2, 20), lines("beam", 4), lines("exhaustive", 2)):
        assert "--method exhaustive" not in plan
    assert "of which at most 20 are evaluated" in lines("ga", 2, 20)
    assert "Cost         376 layer passes; without sharing, 78 combinations would take 936: 60% saved" in lines(
        "exhaustive", 2
    )


def test_the_plan_counts_smaller_sets_apart():
    def plan(method, least):
        settings = SearchSettings(".", method=method, min_layers=least, max_layers=TOTAL)
        return "\n".join(describe_cost(bounds(space_of(settings), settings), settings, TOTAL))

    assert "Candidates   1; at most 78 evaluations, smaller sets on the way included" in plan("greedy", TOTAL)
    assert "the only combination takes" in plan("greedy", TOTAL)
    settings = SearchSettings(".", method="removal", max_layers=3)
    larger = "\n".join(describe_cost(bounds(space_of(settings), settings), settings, TOTAL))
    assert "Candidates   298; at most 77 evaluations, larger sets on the way included" in larger
    assert "Candidates   1, of which 1 is evaluated" in plan("exhaustive", TOTAL)
    assert plan("exhaustive", TOTAL).endswith("without sharing, 1 combination would take 12")  # nothing is saved


@pytest.mark.parametrize("method", ["greedy", "beam", "ga", "removal", "ratio"])
@pytest.mark.parametrize("prior", [{}, PRIOR])
def test_the_budget_that_is_asked_for_is_the_least_that_reaches_the_sizes_wanted(method, prior, tmp_path):
    settings = SearchSettings(tmp_path, method=method, min_layers=4, max_layers=4, **SMALL)
    space = space_of(settings, prior)
    needed = bounds(space, settings).before + 1
    for budget in {max(1, needed - 1), needed}:
        scores = make_scores(tmp_path / str(budget), 32, budget_evaluations=budget)
        with contextlib.suppress(BudgetSpent):
            METHODS[method](space, scores, settings)
        scores.journal.close()
        assert any(layers in space for layers in scores.order) == (budget == needed)
