"""Find the costs of the compared models, as `test_checkpoint.py --efficiency` measured them.

A measurement belongs to a model if the measurement has the digest of the model's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.evaluation_files import EvaluationFiles
from model_preparation.evaluation.efficiency import FOLDER, MEASURED, NUMBERS
from model_preparation.evaluation.results_folder import SETTINGS, read_checked_json
from model_preparation.io.untrusted.untrusted_files import check_fields, read_json

AGAINST_SCORE = ("token_seconds", "cache_bytes")  # fields of `MEASURED` for which there is a Pareto front
_ROW = {"context": int, **dict.fromkeys(MEASURED, (int, float))}
_FIELDS = {"models": [{"weights": str, "dtype": str, "contexts": [_ROW]}], "measured_on": str, "date": str}


@dataclass(frozen=True)
class Cost:
    """A model's cost after a prompt of `context` tokens."""

    context: int
    measured_on: str  # the machine and the dtype
    values: dict[str, float]  # of the fields of `MEASURED`


def costs_of(evaluations: Sequence[EvaluationFiles]) -> list[Cost | None]:
    """Each model's cost, or None if it was not measured. The context is the longest one that all measured models share.

    If they share no context, every cost is None.

    Raises:
        SurgeryError: if a file of measurements is damaged.
    """
    roots = {root: None for each in evaluations for root in _roots(each)}  # in order, each once
    measured: dict[str, tuple[str, dict[int, dict[str, Any]]]] = {}
    for found in sorted(filter(None, map(_read, roots)), key=lambda each: each["date"]):
        for model in found["models"]:
            rows = {row["context"]: row for row in model["contexts"]}
            measured[model["weights"]] = f"{found['measured_on']}, {model['dtype']}", rows
    known = [measured.get(_weights(each)) for each in evaluations]
    shared = set.intersection(*(set(each[1]) for each in known if each)) if any(known) else set()
    if not shared:
        return [None] * len(evaluations)
    context = max(shared)
    return [
        None if each is None else Cost(context, each[0], {name: each[1][context][name] for name in MEASURED})
        for each in known
    ]


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The indices of the models on the Pareto front, the cheapest first.

    Each of these models scores higher than every other model of the same or a lower cost.
    """
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -scores[place])):
        if not front or scores[place] > scores[front[-1]]:
            front.append(place)
    return front


def _roots(evaluation: EvaluationFiles) -> list[Path]:
    """The folders that may have measurements of the evaluated model."""
    if evaluation.checkpoint is not None:
        return [evaluation.checkpoint / EVALUATIONS]
    return [evaluation.given, evaluation.given.parent]


def _read(root: Path) -> dict[str, Any] | None:
    path = root / FOLDER / NUMBERS
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        check_fields(found, _FIELDS)
    except ValueError as error:
        raise SurgeryError(
            f"{path} is not a measurement of this program ({error}). Remove it, or measure again."
        ) from error
    return found


def _weights(evaluation: EvaluationFiles) -> str:
    """The digest of the evaluated model's weights, or "" for an evaluation that is not ours."""
    settings = read_checked_json(evaluation.results_path.parents[1] / SETTINGS) or {}
    return str(settings.get("model", {}).get("weights", ""))
