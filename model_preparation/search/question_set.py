"""The questions that candidates answer, in the same batches in which `ScoringLM` would answer them.

lm-eval makes the prompts: it evaluates a model that only records the requests. So every setting works as in lm-eval.

The search takes tasks that are answered by log-likelihoods (`multiple_choice`, `loglikelihood`), with options of one or
several tokens, and that have the metric `acc`. A question's value is its `acc`, 0 or 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

from blake3 import blake3
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.config.task import TaskConfig
from torch import Tensor

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import run_tasks
from model_preparation.evaluation.scoring import Answer, Row, ScoringLM, longest_first, padded
from model_preparation.evaluation.tasks import Tasks, read_configs

METRIC = "acc"
_OTHERS = {"generate_until": "generated text", "loglikelihood_rolling": "the likelihood of whole texts"}
_TAKEN = "The search takes tasks answered by log-likelihoods (multiple_choice, loglikelihood) and scored by acc"


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        task: the index of their task.
        prefix: the index of the tokens that come before them.
        rows: which row answers which requests of the task.
        inputs: tokens, (rows, length) int64.
        positions: the positions to score, (rows, kept) int64.
    """

    task: int
    prefix: int
    rows: list[Row]
    inputs: Tensor
    positions: Tensor


class BatchResult(NamedTuple):
    """A candidate's result for a batch.

    `answers` has (index of the task's request, answer). `divergences` has, for the objective `kl`, the mean KL to the
    donor over each row's scored positions, in nats.
    """

    answers: list[tuple[int, Answer]]
    divergences: list[float] | None


@dataclass
class _Task:
    """A task's requests: as lm-eval makes them, and as tokens."""

    name: str
    task: Any
    instances: list[Instance]
    tokens: list[tuple]


@dataclass(frozen=True)
class Question:
    """A task's document. `requests` are its options, in order; `batches` answer them."""

    task: int
    doc: Any
    requests: tuple[int, ...]
    batches: frozenset[int]


class QuestionSet:
    """All questions.

    Args:
        lm: gives tokens and batches; its model does not run.
        loaded: the tasks.
        settings: what `settings_of` gives, with `device`.

    Attributes:
        prefixes: the common first tokens of the rows of some batches. They run once; they are empty if too few.
        batches: run after their prefixes.
        questions: in the order of the tasks.
        digest: of all requests and right answers.

    Raises:
        SurgeryError: for tasks that the search does not take.
    """

    def __init__(self, lm: ScoringLM, loaded: Tasks, settings: Mapping[str, Any]):
        by_name = {task.task_name: task for task in loaded.single}
        self.prefixes: list[tuple[int, ...]] = []
        self.batches: list[Batch] = []
        self.questions: list[Question] = []
        self._tasks: list[_Task] = []
        recorder = _RequestRecorder()
        # lm-eval would ask pip, nvcc and others about this machine, which takes a second, and nobody reads it.
        with patch("lm_eval.evaluator.add_env_info"):
            run_tasks(recorder, loaded, settings)
        by_task: dict[str, list[Instance]] = {}
        for instance in recorder.asked:
            by_task.setdefault(str(instance.task_name), []).append(instance)
        for name, instances in by_task.items():
            _check_task(name, by_name[name], instances)
            self._add(_Task(name, by_name[name], instances, _as_tokens(lm, instances)), lm)
        self.digest = blake3(repr([self._asked(question) for question in self.questions]).encode()).hexdigest()

    def _add(self, task: _Task, lm: ScoringLM) -> None:
        """Sort a task's requests into batches as `ScoringLM` does, and into questions."""
        index = len(self._tasks)
        self._tasks.append(task)
        batch_of: dict[int, int] = {}
        for rows, prefix in lm.groups(task.tokens):
            rows = longest_first(rows)
            start = 0
            while start < len(rows):
                batch = lm.next_batch(rows, start, len(prefix))
                batch_of |= {request: len(self.batches) for row in batch for request in row.requests}
                self.batches.append(Batch(index, len(self.prefixes), batch, *padded(batch, len(prefix))))
                start += len(batch)
            self.prefixes.append(prefix)
        by_doc: dict[Any, list[int]] = {}
        for request, instance in enumerate(task.instances):
            by_doc.setdefault(instance.doc_id, []).append(request)
        for requests in by_doc.values():
            requests.sort(key=lambda request: task.instances[request].idx)
            batches = frozenset(batch_of[request] for request in requests)
            self.questions.append(Question(index, task.instances[requests[0]].doc, tuple(requests), batches))

    def tokens(self, task: int) -> list[tuple]:
        """A task's requests for `ScoringLM`: (texts, context tokens, continuation tokens)."""
        return self._tasks[task].tokens

    def values(self, results: Mapping[int, BatchResult]) -> dict[int, float]:
        """Right (1) or wrong (0), by question, if all its batches are in `results`.

        Raises:
            SurgeryError: if a log-likelihood is not finite.
        """
        answers = {
            (self.batches[batch].task, request): answer
            for batch, result in results.items()
            for request, answer in result.answers
        }
        found = {}
        for index, question in enumerate(self.questions):
            if question.batches <= results.keys():
                task = self._tasks[question.task]
                given = [answers[question.task, request] for request in question.requests]
                if not all(math.isfinite(likelihood) for likelihood, _ in given):
                    raise SurgeryError(f"the logits for a question of {task.name} are not finite")
                found[index] = float(task.task.process_results(question.doc, given)[METRIC])
        return found

    def divergences(self, results: Mapping[int, BatchResult]) -> dict[int, float]:
        """The mean KL to the donor over a question's rows, in nats, by question, if all its batches are in `results`.

        Raises:
            SurgeryError: if a divergence is not finite.
        """
        of_request: dict[tuple[int, int], tuple[int, int, float]] = {}
        for index, result in results.items():
            assert result.divergences is not None
            batch = self.batches[index]
            for place, (row, divergence) in enumerate(zip(batch.rows, result.divergences, strict=True)):
                of_request |= {(batch.task, request): (index, place, divergence) for request in row.requests}
        found = {}
        for number, question in enumerate(self.questions):
            if question.batches <= results.keys():
                rows = {of_request[question.task, request] for request in question.requests}
                found[number] = sum(divergence for _, _, divergence in sorted(rows)) / len(rows)
                if not math.isfinite(found[number]):
                    raise SurgeryError("the logits are not finite")
        return found

    def _asked(self, question: Question) -> tuple:
        task = self._tasks[question.task]
        texts = [task.instances[request].args for request in question.requests]
        return task.name, texts, task.task.doc_to_target(question.doc)


class _RequestRecorder(LM):
    """A model that only records its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Instance] = []

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        self.asked += requests
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise _refusal_of(str(requests[0].task_name), "loglikelihood_rolling")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise _refusal_of(str(requests[0].task_name), "generate_until")


def _as_tokens(lm: ScoringLM, instances: list[Instance]) -> list[tuple]:
    """Requests as `ScoringLM` tokenizes them: it gets them without answering."""
    found: list[tuple] = []

    def take(requests: Sequence[tuple], **_: Any) -> list[Answer]:
        found.extend(requests)
        return [(0.0, False)] * len(requests)

    with patch.object(lm, "_loglikelihood_tokens", take):
        lm.loglikelihood(instances, disable_tqdm=True)
    return found


def check_tasks(names: Sequence[str]) -> None:
    """Refuse tasks that the search does not take, as far as their definitions show it.

    Raises:
        SurgeryError: for such a task, and as `load_tasks`.
    """
    for config in read_configs(names):
        _check_config(config)


def _check_config(config: TaskConfig) -> None:
    if config.output_type in _OTHERS:
        raise _refusal_of(str(config.task), config.output_type)
    if config.filter_list is not None:
        raise _refusal(str(config.task), "has filters (filter_list)")


def _check_task(name: str, task: Any, instances: Sequence[Instance]) -> None:
    """Refuse a task if its score is not the mean of its questions' acc."""
    _check_config(task.config)
    if any(instance.repeats != 1 for instance in instances):
        raise _refusal(name, "asks each question several times (repeats)")
    if METRIC not in task.aggregation():
        raise _refusal(name, f"has no metric {METRIC} (only {', '.join(task.aggregation()) or 'none'})")


def _refusal_of(name: str, output_type: str) -> SurgeryError:
    return _refusal(name, f"asks for {_OTHERS[output_type]} ({output_type})")


def _refusal(name: str, what: str) -> SurgeryError:
    return SurgeryError(f"The task {name} {what}. {_TAKEN}. Choose another --task.")
