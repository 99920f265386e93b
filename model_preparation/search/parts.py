"""The questions in growing parts, so that a candidate can be told to be worse by few of them.

In: a `QuestionSet`. Out: parts of it; the first two hold a sixteenth of the tokens each, about, and each of the others
as much as all before it. Questions that are answered in the same batches are in the same part; which, is drawn.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from model_preparation.search.question_set import QuestionSet

SHARES = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_SEED = 0  # not the search's: what was evaluated for one serves another


@dataclass(frozen=True)
class Part:
    """Some of the questions, by index, and the batches that answer them and no others."""

    questions: list[int]
    batches: list[int]


def divide(questions: QuestionSet, shares: Sequence[float] = SHARES) -> list[Part]:
    """The parts, none of them empty; fewer than `shares` where the questions cannot be told apart that finely."""
    together = _answered_together(questions)
    random.Random(_SEED).shuffle(together)
    tokens = [sum(questions.batches[batch].inputs.numel() for batch in batches) for batches in together]
    ends = [sum(shares[: number + 1]) * sum(tokens) for number in range(len(shares))]
    ends[-1] = float("inf")  # whatever rounding does
    drawn: list[list[int]] = [[] for _ in shares]
    seen = 0.0
    for batches, size in zip(together, tokens, strict=True):
        drawn[next(number for number, end in enumerate(ends) if seen + size / 2 <= end)] += batches
        seen += size
    part_of = {batch: number for number, batches in enumerate(drawn) for batch in batches}
    asked: list[list[int]] = [[] for _ in shares]
    for index, question in enumerate(questions.questions):
        asked[part_of[min(question.batches)]].append(index)
    return [Part(indices, sorted(batches)) for indices, batches in zip(asked, drawn, strict=True) if batches]


def _answered_together(questions: QuestionSet) -> list[list[int]]:
    """The batches in groups, such that every question is answered within one group."""
    leader = list(range(len(questions.batches)))

    def find(batch: int) -> int:
        while leader[batch] != batch:
            batch = leader[batch]
        return batch

    for question in questions.questions:
        first = find(min(question.batches))
        for batch in question.batches:
            leader[find(batch)] = first
    groups: dict[int, list[int]] = {}
    for batch in range(len(leader)):
        groups.setdefault(find(batch), []).append(batch)
    return list(groups.values())
