"""A model between lm-eval and the real one, which keeps every task's answers on the disk as soon as it has them.

In: lm-eval's requests. Out: their answers: from the records of an earlier run where they are of the same requests, else
from the real model, which is loaded only if it is needed. A record appears whole or not at all, so a run may be killed
anywhere: the next one answers what is missing.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import rich
import rich.progress
from blake3 import blake3
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from model_preparation import interrupts
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.results_folder import ResultsFolder


class RecordedLM(LM):
    """An lm-eval model whose answers are kept per task.

    Args:
        load: makes the real model; it is given a function that is to be told how many requests were answered.
        results: where the records are; None keeps nothing.

    Attributes:
        asked: how many requests the real model answered, by task.
    """

    def __init__(self, load: Callable[[Callable[[int], None]], LM], results: ResultsFolder | None = None):
        super().__init__()
        self._load = load
        self._results = results
        self._lm: LM | None = None
        self._progress = _question_progress()
        self.asked: dict[str, int] = {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(value, bool(greedy)) for value, greedy in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answers("generate_until", requests)

    def __getattr__(self, name: str) -> Any:
        """Whatever else lm-eval asks of a model, the real one answers."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    @property
    def tokenizer_name(self) -> str:
        return self._real().tokenizer_name

    def apply_chat_template(self, *args, **kwargs) -> str:
        return self._real().apply_chat_template(*args, **kwargs)

    def _real(self) -> LM:
        if self._lm is None:
            self._lm = self._load(lambda count: self._progress.advance(self._progress.task_ids[0], count))
        return self._lm

    def _answers(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        """Answers in the requests' order, task by task."""
        indices: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            indices.setdefault(str(request.task_name), []).append(index)
        if self._results is not None:
            # A sample's line holds its requests and a little more.
            self._results.check_space(sum(_size_bytes(request) for request in requests))
        answers: list[Any] = [None] * len(requests)
        with self._progress:
            bar = self._progress.add_task("", total=len(requests))
            kept = {
                task: self._kept(kind, task, [requests[place] for place in places]) for task, places in indices.items()
            }
            count = sum(found is not None for found in kept.values())
            if count:
                self._progress.console.print(f"{count} of {len(indices)} tasks were answered before", highlight=False)
            for number, (task, places) in enumerate(indices.items(), start=1):
                self._progress.update(bar, description=f"{number}/{len(indices)} {task}")
                asked = [requests[place] for place in places]
                found = kept[task]
                if found is None:
                    found = self._ask(kind, task, asked)
                    interrupts.check()
                else:
                    self._progress.advance(bar, len(asked))
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
            self._progress.remove_task(bar)
        return answers

    def _kept(self, kind: str, task: str, requests: list[Instance]) -> list[Any] | None:
        record = None if self._results is None else self._results.read_record(f"{kind}.{task}")
        if record is None or record.get("requests") != _digest(requests) or len(record["answers"]) != len(requests):
            return None
        return record["answers"]

    def _ask(self, kind: str, task: str, requests: list[Instance]) -> list[Any]:
        started = time.monotonic()
        answers = getattr(self._real(), kind)(requests, disable_tqdm=True)
        _check_finite(kind, task, requests, answers)
        self.asked[task] = self.asked.get(task, 0) + len(requests)
        seconds = time.monotonic() - started
        if self._results is not None:
            record = {"task": task, "requests": _digest(requests), "seconds": round(seconds, 3), "answers": answers}
            self._results.keep_record(f"{kind}.{task}", record)
        if not self._progress.console.is_terminal:  # a log shows no bar
            self._progress.console.print(
                f"{task}: {len(requests)} requests, {seconds:.1f} s", highlight=False, markup=False
            )
        return answers


def _question_progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        transient=True,
        disable=not rich.get_console().is_terminal,  # a log gets a line per task instead
    )


def _size_bytes(request: Instance) -> int:
    return sum(len(argument.encode()) for argument in request.args if isinstance(argument, str))


def _digest(requests: Sequence[Instance]) -> str:
    """BLAKE3 of everything that is asked, in order."""
    return blake3(json.dumps([request.args for request in requests], default=str).encode()).hexdigest()


def _check_finite(kind: str, task: str, requests: Sequence[Instance], answers: Sequence[Any]) -> None:
    """NaN compares as an answer like any other, so a broken model would get the score of guessing."""
    if kind == "generate_until":
        return
    for request, answer in zip(requests, answers, strict=True):
        if not math.isfinite(answer if kind == "loglikelihood_rolling" else answer[0]):
            raise SurgeryError(
                f"The model's logits for question {request.doc_id} of {task} are not finite, so it has no score. "
                "Try --dtype float32; if that fails too, build the checkpoint again."
            )
