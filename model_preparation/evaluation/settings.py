"""The settings of an evaluation and of generated text: defaults, flags with their help, what is allowed.

Nothing heavy is imported here.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from model_preparation.command_line import CommandParser, number
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.recall_texts import LANGUAGES
from model_preparation.evaluation.suites import SUITES

if TYPE_CHECKING:
    import torch

    from model_preparation.evaluation.tasks import Tasks


class Flag(NamedTuple):
    """Makes a field a flag of a command too; `read` is what argparse calls `type`."""

    metavar: str | None
    help: str
    read: Callable[[str], Any] = str
    nargs: str | None = None


def add_flags(parser: CommandParser, settings: type) -> None:
    """Add a flag for each field of a settings class that is annotated with one."""
    for name, default, flag in _flags(settings):
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=flag.help)
        else:
            default = list(default) if isinstance(default, tuple) else default
            more = {"metavar": flag.metavar, "help": flag.help, "type": flag.read, "nargs": flag.nargs}
            parser.add_argument(f"--{name}", default=default, **more)


def _flags(settings: Any) -> list[tuple[str, Any, Flag]]:
    """(name, default, flag) of the fields of a settings class, or of an object of it."""
    found = [(each, getattr(each.type, "__metadata__", (None,))[0]) for each in fields(settings)]
    return [(each.name, each.default, flag) for each, flag in found if flag is not None]


class _Checked:
    """Settings that refuse what their flags refuse."""

    def __post_init__(self) -> None:
        for name, default, flag in _flags(self):
            value = getattr(self, name)
            if value is None or default is False or flag.read in (str, Path):
                continue
            for each in value if flag.nargs else [value]:
                try:
                    flag.read(str(each))
                except argparse.ArgumentTypeError as error:
                    raise SurgeryError(f"{name} is {each!r}: {error}. Give another value.") from None


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(number(int, least=1)(text))


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return read


def _task_and_folder(text: str) -> str:
    task, equals, folder = text.partition("=")
    if not (task and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=DIR, such as gsm8k=/path/to/folder")
    return text


@dataclass(frozen=True)
class EvaluationSettings(_Checked):
    """How a model is scored. The flags' help explains the first fields.

    Attributes:
        tasks: also the result of `load_tasks`; then what says how tasks are made is not used.
        seed: of Python, NumPy, torch and the choice of examples.
        device, dtype, parallelize: where and in what dtype the model runs, as `load_checkpoint` takes them.
        tokenizer: for a model that is published without one, such as Llamba: a name, folder or hub id.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if a number is too small.
    """

    tasks: Annotated[
        "Sequence[str] | Tasks",
        Flag(
            "TASK",
            "tasks, groups or tags of lm-eval; embedded_recall, the task for tiny_llama and tiny_llamba; recall tasks "
            "that are made here, such as kv_retrieval; or folders of task files, which may run code (default: mmlu)",
            nargs="+",
        ),
    ] = ("mmlu",)
    suite: Annotated[
        str | None,
        Flag(
            "|".join(SUITES),
            "a set of tasks that papers report, in place of --tasks; it says the number of solved examples and the "
            "metric of each",
            _one_of(SUITES),
        ),
    ] = None
    lengths: Annotated[
        Sequence[int] | None,
        Flag(
            "TOKENS",
            "recall tasks: tokens of a document, with room for the answer (default: 512, doubled up to what the model "
            "takes)",
            number(int, least=32),
            nargs="+",
        ),
    ] = None
    language: Annotated[
        str,
        Flag("|".join(LANGUAGES), "recall tasks: language of the documents (default: %(default)s)", _one_of(LANGUAGES)),
    ] = "en"
    haystack: Annotated[
        str | Path | None,
        Flag("FILE", "recall tasks: a text to hide things in (default: sentences of ours)", Path),
    ] = None
    limit: Annotated[
        int | None, Flag("N", "ask only the first N questions of every subject: quick and rough", number(int, least=1))
    ] = None
    mmlu_data: Annotated[
        str | Path | None,
        Flag(
            "DIR|hub|modelscope",
            "MMLU's questions: a folder in the parquet layout of cais/mmlu, in the original's csv layout or of json "
            "lines; or hub or modelscope, for cais/mmlu from Hugging Face or ModelScope (default: the environment "
            "variable MMLU_DATA, else hub)",
        ),
    ] = None
    task_data: Annotated[
        Sequence[str] | None,
        Flag(
            "TASK=DIR",
            "take a task's questions from a folder and not from a hub: parquet, csv or jsonl files that are named "
            "after their split, such as validation.jsonl",
            _task_and_folder,
            nargs="+",
        ),
    ] = None
    allow_truncation: Annotated[
        bool,
        Flag(
            None,
            "cut prompts that are too long for the model on their left, and count them (default: they are an error)",
        ),
    ] = False
    num_fewshot: Annotated[
        int | None,
        Flag("K", "solved examples before each question (default: what the task says; MMLU: 0)", number(int, least=0)),
    ] = None
    batch_size: Annotated[
        int | str,
        Flag("N", "questions per forward pass; auto finds a number that fits (default: %(default)s)", _batch_size),
    ] = "auto"
    results_dir: Annotated[
        str | Path | None,
        Flag(
            "DIR",
            "keep answers and results here, in a folder of the checkpoint's name (default: evaluations/ in the "
            "checkpoint's folder)",
            Path,
        ),
    ] = None
    seed: int = 1234
    device: "str | torch.device" = "cpu"
    dtype: "torch.dtype | str | None" = None
    parallelize: bool = False
    tokenizer: str | None = None
    sources: Mapping[str, str] | None = None


@dataclass(frozen=True)
class GenerationSettings(_Checked):
    """How a model writes after a prompt. The flags' help explains the fields.

    Without `do_sample`, `temperature`, `top_p` and `top_k`, the likeliest token is taken each time. The model's own
    settings do not count. Text n of a prompt, counted from 0, is drawn with the seed `seed + n`.

    Raises:
        SurgeryError: if a number is too small or too large.
    """

    chat: Annotated[
        bool,
        Flag(
            None,
            "put every text into the tokenizer's chat template, as a user's message (default: texts are continued, as "
            "base models do; messages always go through the template)",
        ),
    ] = False
    max_new_tokens: Annotated[
        int, Flag("N", "tokens to write per prompt (default: %(default)s)", number(int, least=1))
    ] = 50
    do_sample: Annotated[
        bool,
        Flag(None, "draw tokens at random; each of the next three implies it (default: the likeliest token each time)"),
    ] = False
    temperature: Annotated[
        float | None,
        Flag("X", "below 1 likely tokens become likelier, above 1 less likely (default: 1)", number(float, above=0)),
    ] = None
    top_p: Annotated[
        float | None,
        Flag(
            "P",
            "draw among the likeliest tokens of this joint probability (default: 1)",
            number(float, above=0, most=1),
        ),
    ] = None
    top_k: Annotated[
        int | None, Flag("K", "draw among the K likeliest tokens (default: all)", number(int, least=1))
    ] = None
    num_return_sequences: Annotated[
        int, Flag("N", "texts to draw per prompt, one after the other (default: %(default)s)", number(int, least=1))
    ] = 1
    seed: Annotated[
        int,
        Flag(
            "N",
            "seed of everything random, here and in the evaluation (default: %(default)s)",
            number(int, least=0, most=2**32 - 1),  # NumPy's limit
        ),
    ] = 1234

    @property
    def sampling(self) -> dict[str, Any] | None:
        """temperature, top_p, top_k and seed; None if the likeliest token is taken each time."""
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # 0: all
        given = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        return {**defaults, **given, "seed": self.seed} if given or self.do_sample else None


EVALUATION_SETTINGS = tuple(name for name, _, _ in _flags(EvaluationSettings))
GENERATION_SETTINGS = tuple(each.name for each in fields(GenerationSettings))
