"""A model for lm-eval that keeps its answers on the disk, so that an evaluation can be stopped and continued.

Log-likelihoods are written after each task, texts after each batch. If an earlier run made the same requests for a
task, its answers are used. The real model answers the other requests. It is loaded when it is first needed.
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
from model_preparation.evaluation.scoring_lm import ScoringLM
from model_preparation.io.complete_folder import check_space


class ResumableLM(LM):
    """An lm-eval model that keeps its answers per task.

    Args:
        load: makes the real model. It gets a function that the model calls with the number of requests just answered.
        results: the folder for the records of answers; None keeps nothing.

    Attributes:
        asked: {task: number of requests that the real model answered}.
        truncated: {task: number of prompts that were cut}, for tasks with such prompts.
    """

    def __init__(self, load: Callable[[Callable[[int], None]], ScoringLM], results: ResultsFolder | None = None):
        super().__init__()
        self._load = load
        self._results = results
        self._lm: ScoringLM | None = None
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            transient=True,
            disable=not rich.get_console().is_terminal,  # a log gets a line per task instead
        )
        self.asked: dict[str, int] = {}
        self.truncated: dict[str, int] = {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(value, bool(greedy)) for value, greedy in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answers("generate_until", requests)

    def __getattr__(self, name: str) -> Any:
        """Everything else that lm-eval asks for comes from the real model."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    @property
    def tokenizer_name(self) -> str:
        return self._real().tokenizer_name

    def apply_chat_template(self, *args, **kwargs) -> str:
        return self._real().apply_chat_template(*args, **kwargs)

    def _real(self) -> ScoringLM:
        if self._lm is None:
            self._lm = self._load(lambda count: self._progress.advance(self._progress.task_ids[0], count))
        return self._lm

    def _answers(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        """Answers in the requests' order, task by task."""
        indices: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            indices.setdefault(str(request.task_name), []).append(index)
        by_task = {task: [requests[index] for index in places] for task, places in indices.items()}
        if self._results is not None:
            # lm-eval's samples files will hold at least the texts of the requests. Refuse if even these do not fit.
            arguments = [argument for request in requests for argument in request.args if isinstance(argument, str)]
            check_space(self._results.folder, sum(len(argument.encode()) for argument in arguments))
        answers: list[Any] = [None] * len(requests)
        with self._progress:
            bar = self._progress.add_task("", total=len(requests))
            kept = {task: self._kept(kind, task, asked) for task, asked in by_task.items()}
            if count := sum(None not in record["answers"] for record in kept.values()):
                self._progress.console.print(f"{count} of {len(kept)} tasks were answered before", highlight=False)
            for number, (task, asked) in enumerate(by_task.items(), start=1):
                self._progress.update(bar, description=f"{number}/{len(by_task)} {task}")
                record = kept[task]
                self._progress.advance(bar, sum(answer is not None for answer in record["answers"]))
                if None in record["answers"]:
                    self._ask(kind, task, asked, record)
                    interrupts.check()
                if record["truncated"]:
                    self.truncated[task] = self.truncated.get(task, 0) + record["truncated"]
                for place, answer in zip(indices[task], record["answers"], strict=True):
                    answers[place] = answer
            self._progress.remove_task(bar)
        return answers

    def _kept(self, kind: str, task: str, requests: list[Instance]) -> dict[str, Any]:
        """The record of a task. A missing answer is None. In a new record, all answers are None."""
        new = {"task": task, "requests": _digest(requests), "seconds": 0.0, "truncated": 0}
        record = None if self._results is None else self._results.read_record(f"{kind}.{task}")
        if record is None or record["requests"] != new["requests"] or len(record["answers"]) != len(requests):
            return {**new, "answers": [None] * len(requests)}
        return {**new, **record}

    def _ask(self, kind: str, task: str, requests: list[Instance], record: dict[str, Any]) -> None:
        """Ask the real model for the answers that the record lacks. Write the record when it has new ones."""
        missing = [place for place, answer in enumerate(record["answers"]) if answer is None]
        asked, lm = [requests[place] for place in missing], self._real()
        before, seconds, cut = time.monotonic(), record["seconds"], record["truncated"]
        cut_before = lm.truncated

        def keep(answers: Sequence[tuple[int, Any]]) -> None:
            for index, answer in answers:
                record["answers"][missing[index]] = answer
            record["seconds"] = round(seconds + time.monotonic() - before, 3)
            record["truncated"] = cut + lm.truncated - cut_before
            if self._results is not None:
                self._results.keep_record(f"{kind}.{task}", record)

        if kind == "generate_until":
            for batch in lm.texts(asked):
                keep(batch)
                interrupts.check()
        else:
            answers = getattr(lm, kind)(asked, disable_tqdm=True)
            _check_finite(task, asked, answers)
            keep(list(enumerate(answers)))
        self.asked[task] = self.asked.get(task, 0) + len(asked)
        if not self._progress.console.is_terminal:  # a log shows no bar
            line = f"{task}: {len(asked)} requests, {time.monotonic() - before:.1f} s"
            self._progress.console.print(line, highlight=False, markup=False)


def _digest(requests: Sequence[Instance]) -> str:
    """The BLAKE3 digest of all requests, in their order."""
    return blake3(json.dumps([request.args for request in requests], default=str).encode()).hexdigest()


def _check_finite(task: str, requests: Sequence[Instance], answers: Sequence[Any]) -> None:
    """Refuse NaN and infinity: lm-eval would score them, and a broken model would seem to guess at random."""
    for request, answer in zip(requests, answers, strict=True):
        if not math.isfinite(answer[0] if isinstance(answer, tuple | list) else answer):
            raise SurgeryError(
                f"The model's logits for question {request.doc_id} of {task} are not finite, so there is no score. "
                "Try --dtype float32; if that fails too, build the checkpoint again."
            )
