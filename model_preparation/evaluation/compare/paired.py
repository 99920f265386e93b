"""Statistics for two models' answers to the same questions.

McNemar's exact test says whether a difference is significant. A bootstrap interval says how large the true difference
may be. Holm's method adjusts p-values when many tests are made. Strata are the subjects of a group.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

SIGNIFICANCE = 0.05
_CHUNK = 1_000  # resamples at a time; each of them needs 8 bytes per distinct difference


def mcnemar_p(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test (McNemar 1947; exact: Binomial(gained + lost, 1/2)).

    Args:
        gained: questions that the second model answers right and the first wrong.
        lost: questions that the first model answers right and the second wrong.

    Returns:
        1.0 if there are no such questions, because then nothing suggests a difference.
    """
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def bootstrap_means(
    differences: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """Means of resamples of one stratum's n differences, (resamples,); None for a single question.

    Each resample draws n - 1 differences with replacement. So the variance of its mean is s^2 / n, as it should be.
    With n draws, the variance would be (n - 1) / n of this, and an interval over many small strata would be too narrow
    (McCarthy and Snowden 1985; Rao and Wu 1988, J. Am. Stat. Assoc. 83, 231-241).
    """
    values, counts = np.unique(differences, return_counts=True)
    draws = len(differences) - 1
    if draws < 1:
        return None
    # Draw how often each distinct value occurs: differences of right and wrong have at most three distinct values.
    chunks = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    shares = counts / counts.sum()
    return np.concatenate([rng.multinomial(draws, shares, size=size) @ values for size in chunks]) / draws


def stratified_interval(
    means: Sequence[NDArray[np.float64] | None], sizes: Sequence[int]
) -> tuple[float, float] | None:
    """The percentile interval of the mean over all questions of several strata.

    Args:
        means: for each stratum, what `bootstrap_means` returned.
        sizes: the number of questions of each stratum. It is the stratum's weight, as in lm-eval's groups.

    Returns:
        The two ends of the interval; None if a stratum has a single question, because one answer shows no variation.
    """
    known = [stratum for stratum in means if stratum is not None]
    if len(known) < len(means):
        return None
    whole = sum(size * stratum for size, stratum in zip(sizes, known, strict=True)) / sum(sizes)
    low, high = np.quantile(whole, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    return float(low), float(high)


def standard_error(strata: Sequence[NDArray[np.float64]]) -> float | None:
    """Standard error of the mean over all questions of several strata, pooled as in lm-eval's `pooled_sample_stderr`.

    It is None if no stratum has two questions.
    """
    questions = sum(len(values) for values in strata)
    if questions == len(strata):
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in strata)
    return float(np.sqrt(squares / (questions - len(strata)) / questions))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests.

    If no difference is real, the chance that any adjusted p-value is below 0.05 is at most 5%.

    Source: Holm 1979, Scand. J. Stat. 6, 65-70.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
