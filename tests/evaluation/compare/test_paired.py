"""The statistics, against enumeration of all possibilities and against lm-eval's own formulas."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr

from model_preparation.evaluation.compare.paired import (
    bootstrap_means,
    holm,
    mcnemar_p,
    standard_error,
    stratified_interval,
)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(gained, lost):
    tosses = gained + lost
    uneven = sum(
        math.comb(tosses, heads) for heads in range(tosses + 1) if abs(2 * heads - tosses) >= abs(gained - lost)
    )
    assert mcnemar_p(gained, lost) == pytest.approx(uneven / 2**tosses)


def test_without_a_single_disagreement_nothing_speaks_for_a_difference():
    assert mcnemar_p(0, 0) == 1.0


@pytest.mark.parametrize("differences", [[1, 0, 0, -1], [1, 1, 0, -1, 0], [0.25, -1.5, 0.1, 2.0]])
def test_bootstrap_means_have_the_distribution_of_all_resamples_of_one_question_less(differences):
    values = np.array(differences, dtype=float)
    every = [np.mean(draw) for draw in itertools.product(values, repeat=len(values) - 1)]

    means = bootstrap_means(values, 200_000, np.random.default_rng(0))

    assert means.shape == (200_000,)
    assert set(means.round(9)) == set(np.round(every, 9))
    for value in set(np.round(every, 9)):
        assert np.mean(means.round(9) == value) == pytest.approx(np.mean(np.round(every, 9) == value), abs=0.005)
    # With n - 1 draws, the variance is that of the mean of n independent questions, for any n.
    assert means.var() == pytest.approx(values.var(ddof=1) / len(values), rel=0.02)


def test_strata_are_weighted_by_their_size_and_vary_independently():
    rng = np.random.default_rng(1)
    strata = [rng.choice([-1.0, 0.0, 1.0], size=size, p=[0.2, 0.7, 0.1]) for size in (40, 100, 260)]
    sizes = [len(each) for each in strata]
    mean = np.concatenate(strata).mean()
    spread = math.sqrt(sum(size * each.var(ddof=1) for size, each in zip(sizes, strata, strict=True))) / sum(sizes)

    means = [bootstrap_means(each, 40_000, np.random.default_rng([2, index])) for index, each in enumerate(strata)]
    low, high = stratified_interval(means, sizes)

    # By the central limit theorem. Possible means are about 1/400 apart.
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.003)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.003)


def test_a_single_question_gives_no_interval():
    rng = np.random.default_rng(0)
    assert bootstrap_means(np.array([1.0]), 100, rng) is None
    assert stratified_interval([bootstrap_means(np.array([1.0, 0.0]), 100, rng), None], [2, 1]) is None


def test_models_that_agree_everywhere_have_an_interval_of_no_width():
    means = [bootstrap_means(np.zeros(9), 1_500, np.random.default_rng(0))]
    assert means[0].shape == (1_500,)
    assert stratified_interval(means, [9]) == (0.0, 0.0)


answers = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=9)


@given(st.lists(answers, min_size=1, max_size=5))
def test_standard_errors_are_lm_evals(strata):
    errors = [mean_stderr(each) for each in strata]
    expected = errors[0] if len(strata) == 1 else pooled_sample_stderr(errors, [len(each) for each in strata])
    assert standard_error([np.array(each) for each in strata]) == pytest.approx(expected)


def test_single_questions_have_no_standard_error():
    assert standard_error([np.array([1.0]), np.array([0.0])]) is None


@settings(max_examples=50)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(0.01)), max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """An adjusted p-value is the largest Bonferroni p-value of all sets of tests that contain its test."""

    def bonferroni(chosen):
        return min(1.0, len(chosen) * min(p_values[index] for index in chosen))

    indices = range(len(p_values))
    sets = [chosen for size in indices for chosen in itertools.combinations(indices, size + 1)]
    expected = [max(bonferroni(chosen) for chosen in sets if index in chosen) for index in indices]
    assert holm(p_values) == pytest.approx(expected)
