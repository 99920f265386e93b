"""Which questions each round of a race asks. candidate_scores.py runs the race (`_race`).

A few questions are enough to drop a bad candidate, so the first rounds are short. The first two rounds have about a
sixteenth of all tokens each. Every later round has as many tokens as all rounds before it. Questions are assigned to
rounds at random, but questions that are answered in one batch stay together.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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
