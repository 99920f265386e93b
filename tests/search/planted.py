"""A stand-in for a model: every combination of layers has a known worth, and answers accordingly."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from model_preparation.search.candidate_scores import CandidateScores
from model_preparation.search.journal import Journal
from model_preparation.search.layer_sets import WHOLE_LAYERS, count_passes
from model_preparation.search.objective import Objective
from model_preparation.search.progress import SearchProgress
from model_preparation.search.settings import SearchSettings

TOTAL = 12


class PlantedQuestions:
    """Questions, each alone in its batch. A combination answers about as many right as its worth says."""

    def __init__(self, count: int):
        inputs = SimpleNamespace(numel=lambda: 10)
        self.batches = [SimpleNamespace(inputs=inputs) for _ in range(count)]
        self.questions = [SimpleNamespace(batches=frozenset([number]), task=0) for number in range(count)]

    def values(self, results):
        return dict(results)


def worth(layers) -> float:
    """Additive, but for layers 3 and 7, which gain together, and 5 and 6, which lose together."""
    gains = [0.0, 0.02, 0.01, 0.08, 0.03, 0.07, 0.06, 0.05, 0.01, 0.02, 0.0, 0.04]
    found = 0.3 + sum(gains[layer] for layer in layers)
    found += 0.12 * ({3, 7} <= set(layers)) - 0.10 * ({5, 6} <= set(layers))
    return min(found, 0.99)


@dataclass
class PlantedScorer:
    """Answers by `worth`. The hardness of each question is drawn at random."""

    questions: PlantedQuestions
    total: int = TOTAL
    worth: Callable = worth
    fail: dict = field(default_factory=dict)  # by combination: how often it fails
    layer_passes: float = 0.0
    run: list = field(default_factory=list)

    def answer(self, layers, batches):
        count = len(self.questions.batches)
        hardness = np.random.default_rng(0).permutation(count) / count
        noise = np.random.default_rng([*layers, 99]).normal(0, 0.05, count)
        right = (hardness + noise < self.worth(layers)).astype(float).tolist()
        return {batch: right[batch] for batch in batches}

    def base(self):
        self.layer_passes += self.total
        return self.answer((), range(len(self.questions.batches)))

    def score(self, sets, batches=None):
        sets = list(sets)
        share = len(batches) / len(self.questions.batches)
        self.layer_passes += (count_passes(sets, self.total) - self.total) * share
        for layers in sorted(sets):
            self.run.append((layers, len(batches)))
            if self.fail.get(layers, 0) > 0:
                self.fail[layers] -= 1
                raise RuntimeError("CUDA error: something. Try again")
            yield layers, self.answer(layers, batches)


def make_scores(
    folder, count: int = 400, digest: str = "d", scorer=None, units=WHOLE_LAYERS, **changes
) -> CandidateScores:
    questions = PlantedQuestions(count)
    scorer = scorer or PlantedScorer(questions)
    objective = Objective("accuracy", np.zeros(count, dtype=np.int64), np.arange(count) % 2 == 1)
    journal = Journal(folder / "journal.jsonl")
    settings = SearchSettings(folder, **{"race": False, **changes})
    made = CandidateScores(
        scorer,
        questions,
        objective,
        journal,
        digest,
        total=scorer.total,
        settings=settings,
        progress=SearchProgress(),
        units=units,
    )
    made.scorer, made.journal = scorer, journal
    return made


def draw_sets(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    found = {tuple(sorted(rng.sample(range(TOTAL), rng.randint(1, 4)))) for _ in range(3 * count)}
    return sorted(found)[:count]
