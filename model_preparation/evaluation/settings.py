"""The settings of an evaluation and of generated text: defaults, flags with their help, allowed values.

This file imports no large library.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from model_preparation.command_line import number
from model_preparation.evaluation.recall_wording import LANGUAGES
from model_preparation.evaluation.suites import SUITES
from model_preparation.setting_flags import CheckedSettings, Flag, OneOf, flags_of

if TYPE_CHECKING:
    import torch

    from model_preparation.evaluation.tasks import Tasks


def limit_note(limit: int, tasks: Sequence[str]) -> str:
    """A text that tells the user whether --limit counts per subject or per task."""
    return f"--limit {limit} is per {'subject' if any(name.startswith('mmlu') for name in tasks) else 'task'}"


def auto_or_count(text: str) -> int | str:
    """The value of --batch_size: "auto", or a number from 1 on."""
    return text if text == "auto" else int(number(int, least=1)(text))


def _task_and_folder(text: str) -> str:
    task, equals, folder = text.partition("=")
    if not (task and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=DIR, such as gsm8k=/path/to/folder")
    return text


Seed = Annotated[
    int,
    Flag(
        "N",
        "seed of all random numbers, for texts and for evaluations",
        number(int, least=0, most=2**32 - 1),  # NumPy's limit
    ),
]
Lengths = Annotated[
    Sequence[int] | None,
    Flag(
        "TOKENS",
        "recall tasks: tokens of a document, with room for the answer (default: 512, 1024 and so on, up to the model's "
        "limit)",
        number(int, least=32),
        nargs="+",
    ),
]
Language = Annotated[
    str, Flag("|".join(LANGUAGES), "recall tasks: language of the documents (default: %(default)s)", OneOf(*LANGUAGES))
]
Haystack = Annotated[
    str | Path | None, Flag("FILE", "recall tasks: text around the facts to find (default: built-in sentences)", Path)
]


@dataclass(frozen=True)
class EvaluationSettings(CheckedSettings):
    """How a model is scored. The help of the flags explains the fields that are not in this list.

    Attributes:
        tasks: names, or the result of `load_tasks`. With that result, the settings for making tasks have no effect.
        seed: for Python, NumPy, torch, the choice of solved examples, and the documents of recall tasks.
        device, dtype, parallelize: where and in what dtype the model runs, as `load_checkpoint` takes them.
        tokenizer: a name, folder or hub id, for a model that is published without a tokenizer, such as Llamba.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.
        server: the address of a server with an OpenAI API. The server's model is scored, so no model is loaded.
        model: the model's name on that server; needed if the server has several.

    Raises:
        SurgeryError: for a value that a flag would refuse.
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
            "a set of tasks that papers report, in place of --tasks; it sets the number of solved examples and the "
            "metric of each task",
            OneOf(*SUITES),
        ),
    ] = None
    lengths: Lengths = None
    language: Language = "en"
    haystack: Haystack = None
    limit: Annotated[
        int | None,
        Flag(
            "N",
            "ask only the first N questions of each task, or of each subject of MMLU: quick and rough",
            number(int, least=1),
        ),
    ] = None
    mmlu_data: Annotated[
        str | Path | None,
        Flag(
            "DIR|hub|modelscope",
            "MMLU's questions: a folder with parquet files as in cais/mmlu, csv files as in the original, or json "
            "lines; or the word hub or modelscope, which downloads cais/mmlu from Hugging Face or ModelScope (default: "
            "the environment variable MMLU_DATA, else hub)",
        ),
    ] = None
    task_data: Annotated[
        Sequence[str] | None,
        Flag(
            "TASK=DIR",
            "read a task's questions from a folder, not from a hub: parquet, csv or jsonl files, each named after its "
            "split, such as validation.jsonl",
            _task_and_folder,
            nargs="+",
        ),
    ] = None
    allow_truncation: Annotated[
        bool,
        Flag(
            None,
            "cut off the beginning of a prompt that is too long, and count such prompts (default: they are an error)",
        ),
    ] = False
    num_fewshot: Annotated[
        int | None,
        Flag("K", "solved examples before each question (default: the task's own; MMLU: 0)", number(int, least=0)),
    ] = None
    batch_size: Annotated[
        int | str, Flag("N", "questions per forward pass; auto finds a number that fits", auto_or_count)
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
    seed: Seed = 1234
    device: "str | torch.device" = "cpu"
    dtype: "torch.dtype | str | None" = None
    parallelize: bool = False
    tokenizer: str | None = None
    sources: Mapping[str, str] | None = None
    server: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class EfficiencySettings(CheckedSettings):
    """How a model's cost is measured.

    Attributes:
        compare_with: other models to measure, as `find_others` takes them; by default a checkpoint's base and donor.
        results_dir, device, dtype, tokenizer, sources: as in `EvaluationSettings`. Without `dtype`, all models run in
            the first model's dtype.
    """

    contexts: Annotated[
        Sequence[int] | None,
        Flag(
            "N",
            "with --efficiency: measure after prompts of N tokens (default: those of 128, 512 and 2048 that fit into "
            "the models' positions)",
            number(int, least=1),
            nargs="+",
        ),
    ] = None
    compare_with: Sequence[str] = ()
    results_dir: str | Path | None = None
    device: "str | torch.device" = "cpu"
    dtype: "torch.dtype | str | None" = None
    tokenizer: str | None = None
    sources: Mapping[str, str] | None = None


@dataclass(frozen=True)
class GenerationSettings(CheckedSettings):
    """How a model continues a prompt. The help of the flags explains the fields.

    If none of `do_sample`, `temperature`, `top_p` and `top_k` is set, the likeliest token is taken each time. The
    model's own values of these settings are ignored. Text n of a prompt, counted from 0, is drawn with the seed
    `seed + n`.

    Raises:
        SurgeryError: for a value that a flag would refuse.
    """

    chat: Annotated[
        bool,
        Flag(
            None,
            "put every text into the tokenizer's chat template, as a user's message (default: texts are continued, as "
            "base models do; messages always go through the template)",
        ),
    ] = False
    max_new_tokens: Annotated[int, Flag("N", "tokens to write per prompt", number(int, least=1))] = 50
    do_sample: Annotated[
        bool,
        Flag(None, "draw tokens at random; the next three flags imply this (default: the likeliest token each time)"),
    ] = False
    temperature: Annotated[
        float | None,
        Flag(
            "X",
            "below 1, likely tokens become likelier; above 1, less likely (default: 1)",
            number(float, above=0),
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Flag(
            "P",
            "draw among the likeliest tokens whose probabilities add up to P (default: 1)",
            number(float, above=0, most=1),
        ),
    ] = None
    top_k: Annotated[
        int | None, Flag("K", "draw among the K likeliest tokens (default: all)", number(int, least=1))
    ] = None
    num_return_sequences: Annotated[
        int, Flag("N", "texts to draw per prompt, one after the other", number(int, least=1))
    ] = 1
    seed: Seed = 1234

    @property
    def sampling(self) -> dict[str, Any] | None:
        """temperature, top_p, top_k and seed; None if the likeliest token is taken each time."""
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # top_k 0: draw among all tokens
        given = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        return {**defaults, **given, "seed": self.seed} if given or self.do_sample else None


EVALUATION_SETTINGS = tuple(name for name, _, _ in flags_of(EvaluationSettings) if name != "seed")
GENERATION_SETTINGS = tuple(each.name for each in fields(GenerationSettings))
