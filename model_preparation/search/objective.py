"""The objectives: which value of each question a search maximises; and tests of whether two candidates differ.

`accuracy` is the share of right answers. `kl` is minus the mean Kullback-Leibler divergence of the candidate's
predictions from the donor's, KL(donor || candidate), in nats, over the whole vocabulary at the scored positions. With
`kl` every question gives a distance instead of right or wrong, so fewer questions are enough. `nll` is minus the
loss of the right answer, in nats per token of that answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from model_preparation.evaluation.compare.paired import holm, mcnemar_p, standard_error
from model_preparation.search.settings import ACCURACY

if TYPE_CHECKING:
    from torch import Tensor

Values = NDArray[np.float64]  # (questions,)


def divergence(donors: "Tensor", ours: "Tensor") -> "Tensor":
    """KL(donor || candidate), in nats: the mean over positions, from log-probabilities (positions, vocabulary)."""
    return (donors.exp() * (donors - ours)).sum(-1).mean()


@dataclass(frozen=True)
class Objective:
    """What a search maximises, with tests of its values.

    Args:
        name: one of `OBJECTIVES`.
        strata: each question's task, as an index.
        second: for each question, whether it is of `second_task`.
    """

    name: str
    strata: NDArray[np.int64]
    second: NDArray[np.bool_] | None = None

    def stderr(self, values: Values) -> float | None:
        """The standard error of the mean over all questions, pooled within tasks; None if no task has two questions."""
        return standard_error([values[self.strata == task] for task in np.unique(self.strata)])

    def p_value(self, values: Values, others: Values) -> float:
        """Two-sided p-value of a paired test over questions: McNemar's exact test for `accuracy`, else the t-test."""
        differences = values - others
        if self.name == ACCURACY:
            return mcnemar_p(int((differences > 0).sum()), int((differences < 0).sum()))
        if len(differences) < 2 or not differences.any():
            return 1.0
        if np.ptp(differences) == 0:
            return 0.0  # all differences are equal; the t-test would divide by 0
        return float(ttest_rel(values, others).pvalue)

    def adjusted_p_values(self, best: Values, others: Sequence[Values]) -> list[float]:
        """The p-value of each of `others` against `best`, Holm-adjusted for the number of tests."""
        return holm([self.p_value(best, values) for values in others])
