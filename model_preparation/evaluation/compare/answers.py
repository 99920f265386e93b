"""Read the answers in lm-eval's samples files, and find the questions that several models have in common.

Questions are matched by their content (lm-eval's doc_hash), not by their place: limits and orders may differ. If no
content matches, prompt and target are used. If a task has a question twice (as in MMLU), the first occurrence
is matched with the first, and the second with the second.
The texts stay on the disk; `read_sample` reads those that a report shows.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.evaluation_files import EvaluationFiles
from model_preparation.io.progress import bar
from model_preparation.io.untrusted.untrusted_files import bounded

_HASHES = ("doc_hash", "prompt_hash", "target_hash")
_AGAIN = "Run the evaluation again, or copy the file again."


class Answer(NamedTuple):
    """A model's answer to one question.

    Attributes:
        doc_hash, prompt_hash, target_hash: SHA-256 of question, prompt and target, hexadecimal.
        value: of the metric.
        right_probability: of the right option among the options of a multiple-choice question; NaN for other questions.
        offset: where the question's line begins in the samples file, in bytes.
    """

    doc_hash: str
    prompt_hash: str
    target_hash: str
    value: float
    right_probability: float
    offset: int


@dataclass
class Answers:
    """A model's answers to a task, in the samples file's order.

    Attributes:
        path: the samples file.
        filter: lm-eval's name for how responses were processed before they were scored ("none" for most tasks).
        questions: the answers.
        lines: how many of the file's lines have this filter. Lines without the metric are not in `questions`.
    """

    path: Path
    filter: str
    questions: list[Answer] = field(default_factory=list)
    lines: int = 0

    def read_sample(self, answer: Answer) -> dict[str, Any]:
        """Everything that lm-eval wrote about a question."""
        with self.path.open("rb") as file:
            file.seek(answer.offset)
            return json.loads(file.readline())


def read_answers(
    evaluation: EvaluationFiles, metrics: Mapping[str, str]
) -> tuple[dict[str, Answers], dict[str, list[str]]]:
    """Read the answers to some tasks, with a progress bar.

    Args:
        evaluation: the files.
        metrics: {task: a field of its samples that is a number, such as acc}. If a file has several filters, the first
            one that has the metric counts; "exact_match,strict-match" chooses the filter strict-match.

    Returns:
        {task: answers} for tasks with the wanted metric, and {task: the metrics that it has} for tasks without it.

    Raises:
        SurgeryError: if a file is damaged (the message names file and line), or if a samples file and the results file
            have different numbers of questions.
    """
    answers, without = {}, {}
    size_bytes = sum(evaluation.samples[task].stat().st_size for task in metrics)
    with bar(f"Reading {evaluation.given.name}", size_bytes, in_bytes=True) as advance:
        for task, metric in metrics.items():
            read = _read_task(evaluation.samples[task], metric)
            if isinstance(read, Answers):
                # A file that was cut off between two lines, or written twice, looks whole.
                expected = evaluation.results["n-samples"].get(task, {}).get("effective")
                if expected not in (None, read.lines):
                    raise SurgeryError(
                        f"{read.path} has {read.lines} questions, but {evaluation.results_path.name} has "
                        f"{expected}. {_AGAIN}"
                    )
                answers[task] = read
            else:
                without[task] = read
            advance(evaluation.samples[task].stat().st_size)
    return answers, without


def _read_task(path: Path, metric: str) -> Answers | list[str]:
    """The file's answers; or the metrics that the file has, if `metric` is not one of them."""
    metric, _, filter_name = metric.partition(",")
    found: dict[str, Answers] = {}  # by filter
    has: dict[str, None] = {}
    for number, offset, sample in _lines(path):
        its_filter = str(sample.get("filter", "none"))
        answers = found.setdefault(its_filter, Answers(path, its_filter))
        answers.lines += 1
        named = sample.get("metrics", [metric])
        has |= {f"{name},{its_filter}".removesuffix(",none"): None for name in named}
        if metric in sample and metric in named and its_filter == (filter_name or its_filter):
            answers.questions.append(_answer(sample, metric, offset, where=f"{path}, line {number}"))
    if not found:
        raise SurgeryError(f"{path} is empty. {_AGAIN}")
    return next((answers for answers in found.values() if answers.questions), list(has))


def _answer(sample: dict[str, Any], metric: str, offset: int, *, where: str) -> Answer:
    for name in _HASHES:
        if not isinstance(sample.get(name), str):
            raise SurgeryError(f"{where}, has no {name} to match questions by. Evaluate with lm_eval 0.4.4 or newer.")
    value = sample[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise SurgeryError(
            f"{where}, has {value!r:.40} for {metric}, but only finite numbers can be compared. "
            "Name another metric by --metric, or run the evaluation again."
        )
    hashes = {name: sample[name] for name in _HASHES}
    return Answer(**hashes, value=float(value), right_probability=_right_probability(sample), offset=offset)


def _lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """For each line: its number (from 1), its offset in bytes, and its content."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                sample = json.loads(line, parse_int=bounded)
                if not isinstance(sample, dict) or not isinstance(sample.get("metrics", []), list):
                    raise ValueError("it is not a sample of lm-eval")
            except (ValueError, RecursionError) as error:
                cut = "cut off" if not line.endswith(b"\n") else "damaged"
                raise SurgeryError(f"{path}, line {number}, is {cut}: {error}. {_AGAIN}") from error
            yield number, offset, sample
            offset += len(line)


def _right_probability(sample: dict[str, Any]) -> float:
    """The right option's probability: the softmax over the log-likelihoods of all options. NaN without options."""
    try:
        scores = np.array([float(pair[0]) for pair in sample["filtered_resps"]])
        weights = np.exp(scores - scores.max())
        return float(weights[int(sample["target"])] / weights.sum()) if len(scores) > 1 else math.nan
    except (LookupError, TypeError, ValueError, OverflowError):
        return math.nan


# --- The questions in common ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommonQuestions:
    """The n questions of a task that all m models answered.

    Attributes:
        task: its name.
        answers: for each model, its answers to all questions that it was asked.
        rows: for each common question, the m answers; questions are in the first model's order.
        by_prompt: whether questions were matched by prompt and target, because no content matched.
    """

    task: str
    answers: tuple[Answers, ...]
    rows: list[tuple[Answer, ...]]
    by_prompt: bool

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of all answers, (m, n). `name` is "value" or "right_probability"."""
        return np.array([[getattr(row[model], name) for row in self.rows] for model in range(len(self.answers))])

    def differing(self, name: str) -> int:
        """How many common questions have a `name` (`prompt_hash` or `target_hash`) that differs between models."""
        return sum(len({getattr(answer, name) for answer in row}) > 1 for row in self.rows)


def match(task: str, answers: Sequence[Answers]) -> CommonQuestions:
    """The common questions of a task; there may be none."""
    rows = _common(answers, ("doc_hash",))
    by_prompt = not rows
    if by_prompt:
        # Copies of a data set with one column more or less have different hashes, but the same prompts.
        rows = _common(answers, ("prompt_hash", "target_hash"))
    return CommonQuestions(task, tuple(answers), rows, by_prompt)


def _common(answers: Sequence[Answers], names: Sequence[str]) -> list[tuple[Answer, ...]]:
    """The questions that all models have. `names` are the hashes that identify a question.

    A repeated question counts as often as in the model that has the fewest copies of it.
    """
    found: list[dict[tuple, Answer]] = []
    for each in answers:
        seen: Counter = Counter()
        found.append({})
        for answer in each.questions:
            key = tuple(getattr(answer, name) for name in names)
            found[-1][(*key, seen[key])] = answer
            seen[key] += 1
    return [tuple(each[key] for each in found) for key in found[0] if all(key in each for each in found)]
