"""The answers in lm-eval's samples files, and the questions that several models have in common.

Questions are matched by their content (lm-eval's doc_hash), not by their number: limits and orders may differ. A
question that a task has twice (MMLU does) is matched by its first and its second occurrence. The texts stay on the
disk; `read_sample` reads those that a report shows.
"""

import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.evaluation_files import EvaluationFiles
from model_preparation.io.progress import bar

_HASHES = ("doc_hash", "prompt_hash", "target_hash")
_AGAIN = "Run the evaluation again, or copy the file again."


@dataclass
class Answers:
    """A model's answers to a task's n questions, in the file's order.

    Attributes:
        path: the samples file.
        filter: lm-eval's name of the processing of responses before they were scored ("none" for most tasks).
        doc_hashes, prompt_hashes, target_hashes: n SHA-256 each, hexadecimal, of question, prompt and target.
        values: the metric, float64 (n,).
        right_probability: of the right option of a multiple-choice question, float64 (n,); NaN for other questions.
        offsets: where the lines begin in the file, bytes, int64 (n,).
        lines: the number of the file's lines with this filter; more than n if some lack the metric.
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
    """Read the answers to each of `tasks`, with a progress bar.

    Args:
        evaluation: the files.
        tasks: names of tasks in it.
        metric: a field of the samples that is a number, such as acc. If a file has several filters, the first one that
            has the metric counts; "exact_match,strict-match" names another.

    Returns:
        {task: answers}, and {task: the metrics it has} for tasks without the one asked for.

    Raises:
        SurgeryError: if a file is damaged, with file and line; or if a samples file and the results file have different
            numbers of questions.
    """
    answers, without = {}, {}
    size_bytes = sum(evaluation.samples[task].stat().st_size for task in tasks)
    with bar(f"Reading {evaluation.given.name}", size_bytes, in_bytes=True) as advance:
        for task in tasks:
            read = _read_task(evaluation.samples[task], metric)
            if isinstance(read, Answers):
                # A file that was cut off between two lines, or written twice, looks whole.
                expected = evaluation.results["n-samples"].get(task, {}).get("effective")
                if expected not in (None, read.lines):
                    raise SurgeryError(
                        f"{read.path} has {read.lines} questions, but {evaluation.results_path.name} speaks of "
                        f"{expected}. {_AGAIN}"
                    )
                answers[task] = read
            else:
                without[task] = read
            advance(evaluation.samples[task].stat().st_size)
    return answers, without


def read_sample(answers: Answers, index: int) -> dict[str, Any]:
    """Everything that lm-eval wrote about question `index`."""
    with answers.path.open("rb") as file:
        file.seek(answers.offsets[index])
        return json.loads(file.readline())


def _read_task(path: Path, metric: str) -> Answers | list[str]:
    """The file's answers; or the metrics that it has, if this one is not among them."""
    metric, _, filter_name = metric.partition(",")
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
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
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
                sample = json.loads(line)
                if not isinstance(sample, dict) or not isinstance(sample.get("metrics", []), list):
                    raise ValueError("it is no sample of lm-eval")
            except (ValueError, RecursionError) as error:
                cut = "cut off" if not line.endswith(b"\n") else "damaged"
                raise SurgeryError(f"{path}, line {number}, is {cut}: {error}. {_AGAIN}") from error
            yield number, offset, sample
            offset += len(line)


def _right_probability(sample: dict[str, Any]) -> float:
    """Softmax of the options' log-likelihoods, at the right option; NaN without options."""
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
        answers: each model's, to all its questions.
        indices: of the common questions in them, int64 (m, n), in the first model's order.
        by_prompt: whether they were matched by prompt and target, because no content matched.
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
        """(m, n); NaN where it is unknown."""
        return self._gathered([answers.right_probability for answers in self.answers])

    def differing(self, name: str) -> int:
        """How many common questions differ between the models in `name`: `prompt_hashes` or `target_hashes`."""
        texts = [getattr(answers, name) for answers in self.answers]
        return sum(len({text[i] for text, i in zip(texts, row, strict=True)}) > 1 for row in self.indices.T.tolist())

    def _gathered(self, columns: Sequence) -> NDArray[np.float64]:
        return np.array([np.asarray(column)[rows] for column, rows in zip(columns, self.indices, strict=True)])


def match(task: str, answers: Sequence[Answers]) -> CommonQuestions:
    """The common questions of a task; there may be none."""
    indices = _common([each.doc_hashes for each in answers])
    by_prompt = not indices.size
    if by_prompt:
        # Copies of a data set with one column more or less have other hashes, but the same prompts.
        indices = _common([list(zip(each.prompt_hashes, each.target_hashes, strict=True)) for each in answers])
    return CommonQuestions(task, tuple(answers), indices, by_prompt)


def _common(keys: Sequence[Sequence]) -> NDArray[np.int64]:
    """Indices (m, n) of the keys that all m sequences have, each as often as all have it."""
    places = [{key: index for index, key in enumerate(_numbered(sequence))} for sequence in keys]
    shared = [key for key in places[0] if all(key in place for place in places)]
    return np.array([[place[key] for key in shared] for place in places], dtype=np.int64)


def _numbered(keys: Sequence) -> list[tuple]:
    """Each key with the number of its earlier occurrences."""
    seen: Counter = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered
