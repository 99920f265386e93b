"""Races drop bad candidates early: which questions each round asks, and which candidates stay.

A few questions are enough to drop a bad candidate, so the first rounds are short. The first two rounds have about a
sixteenth of all tokens each. Every later round has as many tokens as all rounds before it. Questions are assigned to
rounds at random, but questions that are answered in one batch stay together.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model_preparation.evaluation.compare.paired import SIGNIFICANCE
from model_preparation.search.layer_sets import LayerSet
from model_preparation.search.objective import Objective, Values
from model_preparation.search.question_set import QuestionSet

SHARES = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_SEED = 0  # the same for every search, so that one search can use the evaluations of another


@dataclass(frozen=True)
class RaceRound:
    """Indices of some questions, and of the batches that answer exactly these questions."""

    questions: list[int]
    batches: list[int]


def race_rounds(questions: QuestionSet, shares: Sequence[float] = SHARES) -> list[RaceRound]:
    """The rounds, none of them empty. There are fewer rounds than `shares` if the batches cannot be split so finely."""
    groups = _answered_together(questions)
    random.Random(_SEED).shuffle(groups)
    tokens = [sum(questions.batches[batch].inputs.numel() for batch in batches) for batches in groups]
    ends = [sum(shares[: number + 1]) * sum(tokens) for number in range(len(shares))]
    ends[-1] = float("inf")  # rounding must leave no batch out
    drawn: list[list[int]] = [[] for _ in shares]
    seen = 0.0
    for batches, size in zip(groups, tokens, strict=True):
        drawn[next(number for number, end in enumerate(ends) if seen + size / 2 <= end)] += batches
        seen += size
    round_of = {batch: number for number, batches in enumerate(drawn) for batch in batches}
    asked: list[list[int]] = [[] for _ in shares]
    for index, question in enumerate(questions.questions):
        asked[round_of[min(question.batches)]].append(index)
    return [RaceRound(indices, sorted(batches)) for indices, batches in zip(asked, drawn, strict=True) if batches]


def survivors(
    values: Mapping[LayerSet, Values], keep: int, objective: Objective, candidates: int, rounds: int
) -> list[LayerSet]:
    """The candidates that stay in a race, the best first. The others are surely worse than the `keep`th best.

    The idea is from Maron and Moore 1997, The Racing Algorithm. The test is `Objective.p_value`, a paired test.

    Args:
        values: by candidate, the values of all questions so far.
        objective: what the search maximises.
        candidates: how many candidates began the race.
        rounds: how many rounds the race has.
    """
    ranked = sorted(values, key=lambda layers: (-values[layers].mean(), len(layers), layers))
    last_kept = values[ranked[keep - 1]]
    limit = SIGNIFICANCE / candidates / (rounds - 1)  # Bonferroni correction, for all tests that this race may make
    return ranked[:keep] + [each for each in ranked[keep:] if objective.p_value(last_kept, values[each]) >= limit]


def _answered_together(questions: QuestionSet) -> list[list[int]]:
    """Groups of batches. All batches that a question needs are in one group."""
    links = [(min(question.batches), batch) for question in questions.questions for batch in question.batches]
    rows, columns = np.array(links).T
    count = len(questions.batches)
    _, labels = connected_components(coo_array((np.ones(len(links)), (rows, columns)), shape=(count, count)), False)
    groups: dict[int, list[int]] = {}
    for batch, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(batch)
    return list(groups.values())
