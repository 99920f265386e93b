"""The sets of tasks that papers on hybrid models report, and how each task is asked.

This file imports no large library.
"""

from collections.abc import Collection
from typing import NamedTuple


class Protocol(NamedTuple):
    """How a task of a suite is asked.

    Attributes:
        shots: solved examples before each question.
        metric: lm-eval's name of the metric that counts; None for the task's own metric. A recall task
            names its own metric after the documents' length, such as "4096".
    """

    shots: int = 0
    metric: str | None = None


_RECALL = {  # recall_tasks.py makes the documents; answers are generated, except in NAME_choice
    name: Protocol()
    for name in (
        *("kv_retrieval", "kv_retrieval_choice"),
        *("niah_single", "niah_multikey", "niah_multikey_choice", "niah_multivalue", "niah_multiquery"),
        *("variable_tracking", "mqar", "mqar_choice"),
    )
}
# Added to the suite recall if --task_data says where their questions are.
_WITH_DATA = {name: Protocol(metric="contains") for name in ("fda", "swde", "squad_completion")}
# For the embedded pair (tiny_llama and tiny_llamba), in place of `_RECALL`.
_EMBEDDED = {name: Protocol() for name in ("embedded_recall", "embedded_recall_generated")}
_ZERO_SHOT = {
    "lambada_openai": Protocol(metric="acc"),
    "hellaswag": Protocol(metric="acc_norm"),
    "piqa": Protocol(metric="acc"),
    "arc_easy": Protocol(metric="acc"),
    "arc_challenge": Protocol(metric="acc_norm"),
    "winogrande": Protocol(metric="acc"),
    "openbookqa": Protocol(metric="acc_norm"),
}
_MMLU = {"mmlu": Protocol(shots=5, metric="acc")}
SUITES = ("recall", "zero_shot", "mmlu", "all")


def tasks_of_suite(suite: str, *, embedded: bool, with_data: Collection[str] = ()) -> dict[str, Protocol]:
    """The tasks of a suite, {task: how it is asked}.

    Args:
        suite: one of `SUITES`.
        embedded: whether the model has the embedded pair's tokenizer.
        with_data: the tasks that --task_data has data for.
    """
    recall = _EMBEDDED if embedded else _RECALL
    recall = recall | {name: protocol for name, protocol in _WITH_DATA.items() if name in with_data}
    parts = {"recall": recall, "zero_shot": _ZERO_SHOT, "mmlu": _MMLU}
    return parts.get(suite) or {name: protocol for part in parts.values() for name, protocol in part.items()}
