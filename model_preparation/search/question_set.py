"""The questions that candidates are scored on, in the batches in which `ScoringLM` would answer them.

In: lm-eval's tasks. Out: a `QuestionSet`. lm-eval itself puts the prompts together, by its own evaluation of a model
that only takes note of what it is asked; so every setting has the effect it has there.

Taken are tasks whose questions are answered by log-likelihoods (`multiple_choice`, and `loglikelihood`), with options
of one or several tokens, and whose metrics have `acc`. A question's value is its `acc`, 0 or 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    """Rows that run at once.

    Attributes:
        task: whose they are, by index.
        prefix: the tokens that come before them, by index.
        rows: what answers which requests of the task.
        inputs: tokens, (rows, length) int64.
        positions: those to score, (rows, kept) int64.
    """

    task: int
    prefix: int
    rows: list[Row]
    inputs: Tensor
    positions: Tensor


class BatchResult(NamedTuple):
    """What a candidate says to a batch.

    `answers` are those to the task's requests, by their index; `divergences` the mean KL to the donor over each row's
    scored positions, in nats, where that was asked for.
    """

    answers: list[tuple[int, Answer]]
    divergences: list[float] | None


@dataclass
class _Task:
    """A task's requests: as lm-eval has them, and as tokens."""

    name: str
    task: Any
    instances: list[Instance]
    tokens: list[tuple] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A task's document; `requests` are its options, in order, `batches` those in which they are answered."""

    task: int
    doc: Any
    requests: tuple[int, ...]
    batches: frozenset[int]


class QuestionSet:
    """Everything that is asked.

    Attributes:
        prefixes: tokens that all rows of some batches begin with, and that run before them; none, if they are too few.
        batches: what is run after them.
        questions: in the tasks' order.
        digest: of all requests and right answers.
        max_length: tokens that a prompt may have.
    """

    def __init__(self, lm: ScoringLM, loaded: Tasks, settings: Mapping[str, Any]):
        """Have lm-eval ask everything.

        Args:
            lm: gives tokens and batches; its model is not run.
            loaded: the tasks.
            settings: as `settings_of` gives them, with `device`.

        Raises:
            SurgeryError: for tasks that cannot be taken.
        """
        by_name = {task.task_name: task for task in loaded.single}
        self.max_length = lm.max_length
        self.prefixes: list[tuple[int, ...]] = []
        self.batches: list[Batch] = []
        self._tasks: list[_Task] = []
        notes = _Notes()
        run_tasks(notes, loaded, settings)
        by_task: dict[str, list[Instance]] = {}
        for instance in notes.asked:
            by_task.setdefault(str(instance.task_name), []).append(instance)
        for name, instances in by_task.items():
            _check_task(name, by_name[name], instances)
            self._tasks.append(_Task(name, by_name[name], instances))
            self._add_batches(lm)
        self.questions = [question for index in range(len(self._tasks)) for question in self._questions(index)]
        self.digest = blake3(repr([self._asked(question) for question in self.questions]).encode()).hexdigest()

    def tokens(self, task: int) -> list[tuple]:
        """A task's requests, as `ScoringLM` takes them: (texts, context tokens, continuation tokens)."""
        return self._tasks[task].tokens

    def values(self, results: Mapping[int, BatchResult]) -> dict[int, float]:
        """Right (1) or wrong (0), by question, for those that are answered whole.

        Args:
            results: by batch.

        Raises:
            SurgeryError: if a log-likelihood is not finite.
        """
        answers = self._answers(results)
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
        """The mean KL to the donor over a question's rows, in nats, by question, for those that are answered whole."""
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

    def _answers(self, results: Mapping[int, BatchResult]) -> dict[tuple[int, int], Answer]:
        return {
            (self.batches[batch].task, request): answer
            for batch, result in results.items()
            for request, answer in result.answers
        }

    def _add_batches(self, lm: ScoringLM) -> None:
        """Sort the last task's requests into batches as `ScoringLM` does."""
        task = self._tasks[-1]
        catcher = _Catcher(lm)
        with catcher:
            lm.loglikelihood(task.instances, disable_tqdm=True)
        task.tokens = catcher.requests
        for rows, tokens in lm.groups(task.tokens):
            self.prefixes.append(tokens)
            rows = longest_first(rows)
            start = 0
            while start < len(rows):
                batch = lm.next_batch(rows, start, len(tokens))
                inputs, positions = padded(batch, len(tokens))
                self.batches.append(Batch(len(self._tasks) - 1, len(self.prefixes) - 1, batch, inputs, positions))
                start += len(batch)

    def _questions(self, index: int) -> list[Question]:
        task = self._tasks[index]
        batch_of = {
            request: number
            for number, batch in enumerate(self.batches)
            if batch.task == index
            for row in batch.rows
            for request in row.requests
        }
        by_doc: dict[Any, list[int]] = {}
        for request, instance in enumerate(task.instances):
            by_doc.setdefault(instance.doc_id, []).append(request)
        found = []
        for requests in by_doc.values():
            requests.sort(key=lambda request: task.instances[request].idx)
            batches = frozenset(batch_of[request] for request in requests)
            found.append(Question(index, task.instances[requests[0]].doc, tuple(requests), batches))
        return found

    def _asked(self, question: Question) -> tuple:
        task = self._tasks[question.task]
        texts = [task.instances[request].args for request in question.requests]
        return task.name, texts, task.task.doc_to_target(question.doc)


class _Notes(LM):
    """A model that only takes note of what it is asked."""

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


class _Catcher:
    """A context in which a `ScoringLM` hands over its requests as tokens instead of answering them."""

    def __init__(self, lm: ScoringLM):
        self._lm = lm
        self.requests: list[tuple] = []

    def __enter__(self) -> None:
        self._lm._loglikelihood_tokens = self._catch  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        del self._lm._loglikelihood_tokens  # the class's own again

    def _catch(self, requests: Sequence[tuple], **_: Any) -> list[Answer]:
        self.requests = list(requests)
        return [(0.0, False)] * len(requests)


def check_tasks(names: Sequence[str]) -> None:
    """Raise SurgeryError for tasks that cannot be taken, as far as that is known without their data.

    Raises:
        SurgeryError: also as `load_tasks`.
    """
    for config in read_configs(names):
        _check_config(config)


def _check_config(config: TaskConfig) -> None:
    if config.output_type in _OTHERS:
        raise _refusal_of(str(config.task), config.output_type)
    if config.filter_list is not None:
        raise _refusal(str(config.task), "has filters (filter_list)")


def _check_task(name: str, task: Any, instances: Sequence[Instance]) -> None:
    """Raise SurgeryError for a task whose score would not be the mean of its questions' acc."""
    _check_config(task.config)
    if any(instance.repeats != 1 for instance in instances):
        raise _refusal(name, "asks each question several times (repeats)")
    if METRIC not in task.aggregation():
        raise _refusal(name, f"has no metric {METRIC} (only {', '.join(task.aggregation()) or 'none'})")


def _refusal_of(name: str, output_type: str) -> SurgeryError:
    return _refusal(name, f"asks for {_OTHERS[output_type]} ({output_type})")


def _refusal(name: str, what: str) -> SurgeryError:
    return SurgeryError(f"The task {name} {what}. {_TAKEN}. Choose another --task.")
