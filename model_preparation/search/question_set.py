"""The questions of a search, in the same batches in which `ScoringLM` would answer them.

lm-eval makes the prompts: it evaluates a model that only records the requests. So every setting works as in lm-eval.

The search takes tasks that are answered by log-likelihoods (`multiple_choice`, `loglikelihood`) and have the metric
`acc`, 0 or 1 for each question. Options may have several tokens. The search also takes tasks that generate text
(`generate_until`). There it asks for the likelihood of the right answer after the prompt, and `acc` is 1 if greedy
decoding would begin with that answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

from blake3 import blake3
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.config.task import TaskConfig
from torch import Tensor

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import run_tasks
from model_preparation.evaluation.recall_tasks import RecallTask
from model_preparation.evaluation.scoring_lm import Answer, Row, ScoringLM, longest_first, padded
from model_preparation.evaluation.tasks import Tasks, read_configs
from model_preparation.search.settings import ACCURACY, KL, NLL

METRIC = "acc"
GENERATES, _ROLLING = "generate_until", "loglikelihood_rolling"
_TAKEN = (
    "The search takes tasks answered by log-likelihoods (multiple_choice, loglikelihood) and scored by acc, and tasks "
    "that generate (generate_until)"
)


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        task: the index of the rows' task.
        prefix: the index, in `QuestionSet.prefixes`, of the tokens before all rows.
        rows: the rows; each says which requests of the task it answers.
        inputs: the tokens after the prefix, (rows, length) int64.
        positions: the positions to score, (rows, kept) int64.
    """

    task: int
    prefix: int
    rows: list[Row]
    inputs: Tensor
    positions: Tensor


class BatchResult(NamedTuple):
    """A candidate's result for a batch.

    `answers` has (index of the task's request, answer). `divergences` is for the objective `kl`: for each row, the mean
    KL to the donor over the row's scored positions, in nats.
    """

    answers: list[tuple[int, Answer]]
    divergences: list[float] | None


@dataclass
class _Task:
    """A task's requests: `instances` are lm-eval's objects, `tokens` are as `QuestionSet.tokens` returns them.

    If the task generates text, each request asks for the likelihood of the right answer instead.
    """

    name: str
    task: Any
    instances: list[Instance]
    tokens: list[tuple]


@dataclass(frozen=True)
class Question:
    """A task's document. `requests` are indices of the task's requests, one per option, in order.

    `batches` are the indices of their batches. For the objective `nll`, `right` is the request of the right option.
    """

    task: int
    doc: Any
    requests: tuple[int, ...]
    batches: frozenset[int]
    right: int | None = None


class QuestionSet:
    """All questions of a search.

    Args:
        lm: makes tokens and batches; its model does not run.
        loaded: the tasks.
        settings: what `settings_of` in evaluation/evaluate.py returns, and `device`.
        objective: the search's objective; `nll` needs the right answers.

    Attributes:
        prefixes: tokens with which all rows of some batches begin. They run once. A prefix may be empty.
        batches: the rows that run together, without their prefix.
        questions: the questions, in the order of the tasks.
        digest: the digest of all requests and right answers.

    Raises:
        SurgeryError: for tasks that the search does not take.
    """

    def __init__(self, lm: ScoringLM, loaded: Tasks, settings: Mapping[str, Any], objective: str = ACCURACY):
        by_name = {task.task_name: task for task in loaded.single}
        self.prefixes: list[tuple[int, ...]] = []
        self.batches: list[Batch] = []
        self.questions: list[Question] = []
        self._tasks: list[_Task] = []
        self._objective = objective
        recorder = _RequestRecorder()
        # lm-eval would run pip, nvcc and others to describe this machine. This takes a second, and nobody reads it.
        with patch("lm_eval.evaluator.add_env_info"):
            run_tasks(recorder, loaded, settings)
        by_task: dict[str, list[Instance]] = {}
        for instance in recorder.asked:
            by_task.setdefault(str(instance.task_name), []).append(instance)
        for name, instances in by_task.items():
            _check_task(name, by_name[name], instances)
            if by_name[name].OUTPUT_TYPE == GENERATES:
                instances = [_ask_right_answer(by_name[name], instance) for instance in instances]
            self._add(_Task(name, by_name[name], instances, _as_tokens(lm, instances)), lm)
        self.digest = blake3(repr([self._asked(question) for question in self.questions]).encode()).hexdigest()

    def _add(self, task: _Task, lm: ScoringLM) -> None:
        """Put a task's requests into batches, as `ScoringLM` does, and into questions."""
        index = len(self._tasks)
        self._tasks.append(task)
        batch_of: dict[int, int] = {}
        for rows, prefix in lm.groups(task.tokens):
            rows = longest_first(rows)
            while rows:
                batch = lm.next_batch(rows, len(prefix))
                batch_of |= {request: len(self.batches) for row in batch for request in row.requests}
                self.batches.append(Batch(index, len(self.prefixes), batch, *padded(batch, len(prefix))))
                rows = rows[len(batch) :]
            self.prefixes.append(prefix)
        by_doc: dict[Any, list[int]] = {}
        for request, instance in enumerate(task.instances):
            by_doc.setdefault(instance.doc_id, []).append(request)
        for requests in by_doc.values():
            requests.sort(key=lambda request: task.instances[request].idx)
            batches = frozenset(batch_of[request] for request in requests)
            doc = task.instances[requests[0]].doc
            right = requests[_right_option(task.task, doc)] if self._objective == NLL else None
            self.questions.append(Question(index, doc, tuple(requests), batches, right))

    def of_tasks(self, names: Sequence[str]) -> list[bool]:
        """For each question, whether it is of one of these single tasks."""
        return [self._tasks[question.task].name in names for question in self.questions]

    def tokens(self, task: int) -> list[tuple]:
        """A task's requests for `ScoringLM`: (texts, context tokens, continuation tokens)."""
        return self._tasks[task].tokens

    def values(self, results: Mapping[int, BatchResult]) -> dict[int, float]:
        """1 for a right answer, 0 for a wrong one; by question, for the questions whose batches are all in `results`.

        Raises:
            SurgeryError: if a log-likelihood is not finite.
        """
        found = {}
        for index, given in self._answers(results).items():
            question = self.questions[index]
            task = self._tasks[question.task].task
            generates = task.OUTPUT_TYPE == GENERATES
            found[index] = float(given[0][1] if generates else task.process_results(question.doc, given)[METRIC])
        return found

    def maximised(self, results: Mapping[int, BatchResult]) -> dict[int, float]:
        """The values that the search maximises, by question, for the questions whose batches are all in `results`.

        Raises:
            SurgeryError: if a number is not finite.
        """
        if self._objective == KL:
            return {index: 0.0 - divergence for index, divergence in self.divergences(results).items()}
        if self._objective == ACCURACY:
            return self.values(results)
        found = {}
        for index, given in self._answers(results).items():
            question = self.questions[index]
            assert question.right is not None
            likelihood, _ = given[question.requests.index(question.right)]
            found[index] = likelihood / len(self.tokens(question.task)[question.right][2])
        return found

    def _answers(self, results: Mapping[int, BatchResult]) -> dict[int, list[Answer]]:
        """The answers to all options, by question, for the questions whose batches are all in `results`."""
        answers = {
            (self.batches[batch].task, request): answer
            for batch, result in results.items()
            for request, answer in result.answers
        }
        found = {}
        for index, question in enumerate(self.questions):
            if question.batches <= results.keys():
                found[index] = [answers[question.task, request] for request in question.requests]
                if not all(math.isfinite(likelihood) for likelihood, _ in found[index]):
                    raise SurgeryError(f"the logits for a question of {self._tasks[question.task].name} are not finite")
        return found

    def divergences(self, results: Mapping[int, BatchResult]) -> dict[int, float]:
        """The mean KL to the donor over a question's rows, in nats, for the same questions as `maximised`.

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
        raise _rolling(str(requests[0].task_name))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += requests
        return [""] * len(requests)


def _ask_right_answer(task: Any, instance: Instance) -> Instance:
    """Turn a request for a text into a request for the likelihood of the right answer."""
    targets = task.doc_to_target(instance.doc)
    # In a recall task, all targets together are the right answer. In other tasks, each target is a right answer.
    # The first one is taken, because few-shot examples show it too.
    if isinstance(targets, list):
        targets = " ".join(map(str, targets)) if isinstance(task, RecallTask) else next(iter(targets), "")
    if targets in (None, ""):
        raise _without_answer(task, instance.doc)
    answer = f"{task.config.target_delimiter}{targets}"
    return replace(instance, request_type="loglikelihood", arguments=(instance.args[0], answer))


def _right_option(task: Any, doc: Any) -> int:
    """The index of a question's right option; of the first right one, if there are several."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    options = task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(target, list):
        target = next(iter(target), None)
    if isinstance(target, str) and target in options:
        target = options.index(target)
    if not isinstance(target, int) or not 0 <= target < len(options):
        raise _without_answer(task, doc)
    return target


def _without_answer(task: Any, doc: Any) -> SurgeryError:
    return SurgeryError(
        f"The search needs a right answer to each question, but the task {task.task_name} has none for "
        f"{str(doc)!r:.80}. Choose another --task."
    )


def _as_tokens(lm: ScoringLM, instances: list[Instance]) -> list[tuple]:
    """Requests as `ScoringLM` tokenizes them. It gets the requests, but its model does not run."""
    found: list[tuple] = []

    def take(requests: Sequence[tuple], **_: Any) -> list[Answer]:
        found.extend(requests)
        return [(0.0, False)] * len(requests)

    with patch.object(lm, "_loglikelihood_tokens", take):
        lm.loglikelihood(instances, disable_tqdm=True)
    return found


def check_tasks(names: Sequence[str]) -> None:
    """Refuse tasks whose definitions show that the search does not take them.

    Raises:
        SurgeryError: for such a task, and for the same reasons as `load_tasks`.
    """
    for config in read_configs(names):
        _check_config(config)


def _check_config(config: TaskConfig) -> None:
    if config.output_type == _ROLLING:
        raise _rolling(str(config.task))
    if config.output_type != GENERATES and config.filter_list is not None:  # filters of generated texts are not used
        raise _refusal(str(config.task), "has filters (filter_list)")


def _check_task(name: str, task: Any, instances: Sequence[Instance]) -> None:
    """Refuse a task that repeats questions. Unless the task generates, also refuse filters and a missing acc."""
    _check_config(task.config)
    if any(instance.repeats != 1 for instance in instances):
        raise _refusal(name, "asks each question several times (repeats)")
    if task.OUTPUT_TYPE != GENERATES and METRIC not in task.aggregation():
        raise _refusal(name, f"has no metric {METRIC} (only {', '.join(task.aggregation()) or 'none'})")


def _rolling(name: str) -> SurgeryError:
    return _refusal(name, f"asks for the likelihood of whole texts ({_ROLLING})")


def _refusal(name: str, what: str) -> SurgeryError:
    return SurgeryError(f"The task {name} {what}. {_TAKEN}. Choose another --task.")
