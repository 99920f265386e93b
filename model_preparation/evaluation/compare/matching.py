"""The questions that all of several evaluations asked.

In: each model's answers to a task. Out: for every common question, where in each model's answers it is. What makes two
questions the same is their content (lm-eval's doc_hash), not their number: limits and orders may differ, and a question
that a task has twice (MMLU does) is matched by its first and second occurrence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_preparation.evaluation.compare.sample_files import Answers


@dataclass(frozen=True)
class CommonQuestions:
    """A task's n questions that all m models answered.

    Attributes:
        task: its name.
        answers: of each model, to all its questions.
        indices: the common ones among those, int64 (m, n), in the first model's order.
        by_prompt: whether they were matched by prompt and target, as no question's content agreed.
    """

    task: str
    answers: tuple[Answers, ...]
    indices: NDArray[np.int64]
    by_prompt: bool

    @property
    def values(self) -> NDArray[np.float64]:
        """The metric, (m, n)."""
        return self._gathered([answers.values for answers in self.answers])

    @property
    def right_probability(self) -> NDArray[np.float64]:
        """(m, n), NaN where it is not known."""
        return self._gathered([answers.right_probability for answers in self.answers])

    def differing(self, name: str) -> int:
        """How many common questions have not the same `prompt_hashes` or `target_hashes` (`name`) in all models."""
        texts = [getattr(answers, name) for answers in self.answers]
        return sum(len({text[i] for text, i in zip(texts, row, strict=True)}) > 1 for row in self.indices.T.tolist())

    def _gathered(self, columns: Sequence) -> NDArray[np.float64]:
        return np.array([np.asarray(column)[rows] for column, rows in zip(columns, self.indices, strict=True)])


def match(task: str, answers: Sequence[Answers]) -> CommonQuestions:
    """The common questions of a task; there may be none."""
    indices = _common([each.doc_hashes for each in answers])
    by_prompt = not indices.size
    if by_prompt:
        # Copies of a data set with one column more or less: other content to the hash, the same question to the model.
        indices = _common([list(zip(each.prompt_hashes, each.target_hashes, strict=True)) for each in answers])
    return CommonQuestions(task, tuple(answers), indices, by_prompt)


def _common(keys: Sequence[Sequence]) -> NDArray[np.int64]:
    """Indices (m, n) of the keys that all m sequences have, each as often as it occurs in all of them."""
    places = [{key: index for index, key in enumerate(_numbered(sequence))} for sequence in keys]
    shared = [key for key in places[0] if all(key in place for place in places)]
    return np.array([[place[key] for key in shared] for place in places], dtype=np.int64)


def _numbered(keys: Sequence) -> list[tuple]:
    """Each key with how often it occurred before."""
    seen: Counter = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered
