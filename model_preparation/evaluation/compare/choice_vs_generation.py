"""Tasks that were answered both by log-likelihood and by generated text: is the order of the models the same?

A distilled hybrid may be as good as its teacher by log-likelihood, but much worse when it generates text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model_preparation.evaluation.recall_tasks import CHOICE, GENERATED, root_of

_GENERATIVE = "_generative"  # of lm-eval's MMLU
_LENGTH = re.compile(r"_(\d+)$")


@dataclass(frozen=True)
class BothWays:
    """The scores of each model on one task, by log-likelihood and by generated answers.

    Attributes:
        changing: the models that are better than another model in one way, and worse than that model in the other way.
    """

    task: str
    models: list[str]
    by_likelihood: list[float]
    generated: list[float]
    changing: list[str]


def asked_both_ways(scores: Mapping[str, Sequence[float]], models: Sequence[str]) -> list[BothWays]:
    """The tasks in `scores` ({task: the score of each model}) that were answered in both ways."""
    found = []
    for generated in scores:
        by_likelihood = _counterpart(generated, scores)
        if by_likelihood is not None:
            one, other = list(scores[by_likelihood]), list(scores[generated])
            changing = [model for place, model in enumerate(models) if _changes(place, one, other)]
            name = generated.replace(GENERATED, "").replace(_GENERATIVE, "")
            found.append(BothWays(name, list(models), one, other, changing))
    return found


def _counterpart(generated: str, tasks: Mapping[str, Sequence[float]]) -> str | None:
    """The task that has the same questions and is answered by log-likelihood; None if there is no such task."""
    length = _LENGTH.search(generated)
    name, end = (generated[: length.start()], length[0]) if length else (generated, "")
    root = root_of(name).removesuffix(_GENERATIVE)
    others = (f"{root}{CHOICE}{end}", *([f"{root}{end}"] if name.endswith((GENERATED, _GENERATIVE)) else []))
    return next((other for other in others if other in tasks and other != generated), None)


def _changes(model: int, one: Sequence[float], other: Sequence[float]) -> bool:
    return any((one[model] - a) * (other[model] - b) < 0 for a, b in zip(one, other, strict=True))
