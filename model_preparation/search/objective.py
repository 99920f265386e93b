"""What a search maximises, per question, and what can be said of the differences.

In: what candidates answered to each question. Out: fitness with its standard error; whether one is better than another.
`accuracy` is the share of right answers. `kl` is minus the mean Kullback-Leibler divergence of the candidate's
predictions from the donor's, KL(donor || candidate) in nats over the whole vocabulary at the scored positions: every
question says how far it is from the donor's answer, not only whether it was right, so fewer questions tell two apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from model_preparation.evaluation.compare.paired import holm, mcnemar_p, standard_error
from model_preparation.search.result_files import ACCURACY, KL

OBJECTIVES = (ACCURACY, KL)

Values = NDArray[np.float64]  # (questions,)


@dataclass(frozen=True)
class Objective:
    """How values become a fitness.

    Args:
        name: one of `OBJECTIVES`.
        strata: the task of every question, by index.
    """

    name: str
    strata: NDArray[np.int64]

    def stderr(self, values: Values) -> float | None:
        """Of the mean of all questions' values, pooled within tasks; None where no task has two questions."""
        return standard_error([values[self.strata == task] for task in np.unique(self.strata)])

    def p_value(self, values: Values, others: Values) -> float:
        """Two-sided, of values to the same questions: McNemar's exact test, or for `kl` the paired t-test."""
        differences = values - others
        if self.name == ACCURACY:
            return mcnemar_p(int((differences > 0).sum()), int((differences < 0).sum()))
        if len(differences) < 2 or not differences.any():
            return 1.0
        if np.ptp(differences) == 0:
            return 0.0  # always by the same amount; the test would divide by 0
        return float(ttest_rel(values, others).pvalue)


def adjusted_p_values(objective: Objective, best: Values, others: Sequence[Values]) -> list[float]:
    """Of each of `others` against `best`, Holm-adjusted for all of them."""
    return holm([objective.p_value(best, values) for values in others])
