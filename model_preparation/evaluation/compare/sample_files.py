"""The answers of an evaluation, question by question, out of lm-eval's samples files.

In: an evaluation's files, a metric. Out: per task, for every question in the file's order: what it is known by, its
value of the metric, how probable the right answer was to the model, and where its line begins. The texts stay on disk;
`read_sample` fetches those that a report shows.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.locate import EvaluationFiles
from model_preparation.io.progress import bar
from model_preparation.io.untrusted.untrusted_files import bounded

_HASHES = ("doc_hash", "prompt_hash", "target_hash")
_AGAIN = "Run the evaluation again, or copy the file again."


@dataclass
class Answers:
    """A model's answers to a task's n questions, in the file's order.

    Attributes:
        path: the samples file.
        filter: lm-eval's name of what was done to the responses before they were scored ("none" for most tasks).
        doc_hashes, prompt_hashes, target_hashes: n SHA-256 each, hexadecimal, of question, prompt and target.
        values: the metric, float64 (n,).
        right_probability: of the right one among a multiple-choice question's options, float64 (n,); NaN elsewhere.
        offsets: where the lines begin in the file, bytes, int64 (n,).
        lines: how many the file has of this filter; more than n where some questions lack the metric.
    """

    path: Path
    filter: str
    doc_hashes: list[str] = field(default_factory=list)
    prompt_hashes: list[str] = field(default_factory=list)
    target_hashes: list[str] = field(default_factory=list)
    values: Any = field(default_factory=partial(array, "d"))
    right_probability: Any = field(default_factory=partial(array, "d"))
    offsets: Any = field(default_factory=partial(array, "q"))
    lines: int = 0

    def __len__(self) -> int:
        return len(self.doc_hashes)


def read_answers(
    evaluation: EvaluationFiles, tasks: list[str], metric: str
) -> tuple[dict[str, Answers], dict[str, list[str]]]:
    """The answers to each of `tasks`, with a progress bar.

    Args:
        evaluation: whose.
        tasks: names of tasks of it.
        metric: a field of the samples that is a number, such as acc; "exact_match,strict-match" takes those of one
            filter, where the samples of several are in the file. Without that it is the file's first.

    Returns:
        {task: answers}, and {task: the metrics it has} for the tasks that have not the one asked for.

    Raises:
        SurgeryError: naming file and line of what is damaged; or if a samples file and the results file disagree about
            the number of questions.
    """
    answers, without = {}, {}
    size_bytes = sum(evaluation.samples[task].stat().st_size for task in tasks)
    with bar(f"Reading {evaluation.given.name}", size_bytes, in_bytes=True) as advance:
        for task in tasks:
            read = _read_task(evaluation.samples[task], *_split(metric))
            if isinstance(read, Answers):
                _check_count(read, evaluation, task)
                answers[task] = read
            else:
                without[task] = read
            advance(evaluation.samples[task].stat().st_size)
    return answers, without


def read_sample(answers: Answers, index: int) -> dict[str, Any]:
    """All that lm-eval wrote of question `index`."""
    with answers.path.open("rb") as file:
        file.seek(answers.offsets[index])
        return json.loads(file.readline())


def _split(metric: str) -> tuple[str, str | None]:
    name, _, filter_name = metric.partition(",")
    return name, filter_name or None


def _read_task(path: Path, metric: str, filter_name: str | None) -> Answers | list[str]:
    """The file's answers; or the metrics there are, if its questions have not this one."""
    found: dict[str, Answers] = {}  # of each filter
    has: dict[str, None] = {}
    for number, offset, sample in _lines(path):
        its_filter = str(sample.get("filter", "none"))
        answers = found.setdefault(its_filter, Answers(path, its_filter))
        answers.lines += 1
        named = sample.get("metrics", [metric])
        has |= {f"{name},{its_filter}".removesuffix(",none"): None for name in named}
        if metric in sample and metric in named and its_filter == (filter_name or its_filter):
            _append(answers, sample, metric, offset, where=f"{path}, line {number}")
    if not found:
        raise SurgeryError(f"{path} is empty. {_AGAIN}")
    return next((answers for answers in found.values() if len(answers)), list(has))


def _append(answers: Answers, sample: dict[str, Any], metric: str, offset: int, *, where: str) -> None:
    for name, hashes in zip(_HASHES, (answers.doc_hashes, answers.prompt_hashes, answers.target_hashes), strict=True):
        if not isinstance(sample.get(name), str):
            raise SurgeryError(f"{where}, has no {name}, by which questions are matched. Evaluate with lm_eval 0.4.4+.")
        hashes.append(sample[name])
    value = sample[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise SurgeryError(
            f"{where}, has {value!r:.40} for {metric}, but only finite numbers can be compared. "
            "Name another metric by --metric, or run the evaluation again."
        )
    answers.values.append(float(value))
    answers.right_probability.append(_right_probability(sample))
    answers.offsets.append(offset)


def _lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Number (from 1), offset in bytes, and content of each line."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                sample = json.loads(line, parse_int=bounded)
                if not isinstance(sample, dict) or not isinstance(sample.get("metrics", []), list):
                    raise ValueError("it is no sample of lm-eval")
            except (ValueError, RecursionError) as error:
                cut = "cut off" if not line.endswith(b"\n") else "damaged"
                raise SurgeryError(f"{path}, line {number}, is {cut}: {error}. {_AGAIN}") from error
            yield number, offset, sample
            offset += len(line)


def _right_probability(sample: dict[str, Any]) -> float:
    """Softmax of the options' log-likelihoods at the right one; NaN where there are none."""
    try:
        scores = np.array([float(pair[0]) for pair in sample["filtered_resps"]])
        weights = np.exp(scores - scores.max())
        return float(weights[int(sample["target"])] / weights.sum()) if len(scores) > 1 else math.nan
    except (LookupError, TypeError, ValueError, OverflowError):
        return math.nan


def _check_count(answers: Answers, evaluation: EvaluationFiles, task: str) -> None:
    """A file cut off between two lines, or written twice, cannot be told from a whole one otherwise."""
    expected = evaluation.results["n-samples"].get(task, {}).get("effective")
    if expected is not None and expected != answers.lines:
        raise SurgeryError(
            f"{answers.path} has {answers.lines} questions, but {evaluation.results_path.name} speaks of {expected}. "
            + _AGAIN
        )
