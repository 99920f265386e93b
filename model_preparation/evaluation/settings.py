"""The settings of an evaluation and of generated text, with every default. Nothing heavy is imported here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.command_line import CommandParser, number
from model_preparation.errors import SurgeryError

if TYPE_CHECKING:
    import torch

    from model_preparation.evaluation.tasks import Tasks


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is scored.

    Attributes:
        tasks: names of lm-eval's tasks, groups or tags; folders or files of task definitions; or the result of
            `load_tasks`, for which `mmlu_data` is not looked at again.
        limit: questions per single task (of MMLU: per subject), from the first on. None takes all.
        mmlu_data: where MMLU's questions are, as `find_questions` takes it.
        num_fewshot: solved examples before each question. None leaves it to the task (MMLU: none).
        batch_size: questions per forward pass. "auto" takes what fits.
        seed: of Python, NumPy, torch and the choice of examples.
        device, dtype, parallelize: where and in what dtype the model runs, as `load_checkpoint` takes them.
        results_dir: answers and results go into a folder of the model's name in it. None takes `evaluations/` in the
            checkpoint's own folder. A model that is no checkpoint needs it.
        tokenizer: for a model published without one, such as Llamba: a name, folder or hub id.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if a number is too small.
    """

    tasks: "Sequence[str] | Tasks" = ("mmlu",)
    limit: int | None = None
    mmlu_data: str | Path | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    seed: int = 1234
    device: "str | torch.device" = "cpu"
    dtype: "torch.dtype | str | None" = None
    parallelize: bool = False
    results_dir: str | Path | None = None
    tokenizer: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(limit=self.limit, num_fewshot=self.num_fewshot, batch_size=self.batch_size)


def check_settings(*, limit: int | None, num_fewshot: int | None, batch_size: int | str) -> None:
    """Raise SurgeryError if a number is too small."""
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is None or (name == "batch_size" and value == "auto"):
            continue
        if not isinstance(value, int) or value < least:
            raise SurgeryError(f"{name} is {value}, but must be at least {least}. Give another number.")


@dataclass(frozen=True)
class GenerationSettings:
    """How a model writes after a prompt.

    Attributes:
        max_new_tokens: tokens to write at most.
        do_sample: draw tokens at random. `temperature`, `top_p` and `top_k` imply it. Without any of the four, the
            likeliest token is taken each time, whatever the model's own settings say.
        temperature: below 1 likely tokens become likelier, above 1 less likely (default: 1).
        top_p: draw among the likeliest tokens that have this probability together (default: 1, all).
        top_k: draw among this many of the likeliest tokens (default: 0, all).
        num_return_sequences: texts per prompt. Text n, counted from 0, is drawn with the seed `seed + n`.
        seed: of the first text that is drawn at random.
        chat: put texts into the tokenizer's chat template too, as a user's message. Messages always go through it.
    """

    max_new_tokens: int = 50
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_return_sequences: int = 1
    seed: int = 1234
    chat: bool = False

    @property
    def sampling(self) -> dict[str, Any] | None:
        """temperature, top_p, top_k and seed; None if the likeliest token is taken each time."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        return {**_SAMPLING, **given, "seed": self.seed} if given or self.do_sample else None


_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
GENERATION_SETTINGS = tuple(each.name for each in fields(GenerationSettings))


def add_scoring_flags(parser: CommandParser) -> None:
    """Add the flags that decide on a score, and --results_dir."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(EvaluationSettings.tasks),  # type: ignore[arg-type]  # by default they are names
        metavar="TASK",
        help="tasks, groups or tags of lm-eval; embedded_recall, the task for tiny_llama and tiny_llamba; or folders "
        "of task files, which may run code (default: mmlu)",
    )
    parser.add_argument(
        "--limit",
        type=number(int, least=1),
        metavar="N",
        help="ask only the first N questions of every subject: quick and rough",
    )
    parser.add_argument(
        "--mmlu_data",
        metavar="DIR|hub|modelscope",
        help="MMLU's questions: a folder in the parquet layout of cais/mmlu, in the original's csv layout or of json "
        "lines; or hub or modelscope, for cais/mmlu from Hugging Face or ModelScope (default: the environment variable "
        "MMLU_DATA, else hub)",
    )
    parser.add_argument(
        "--num_fewshot",
        type=number(int, least=0),
        metavar="K",
        help="solved examples before each question (default: what the task says; for MMLU 0)",
    )
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default=EvaluationSettings.batch_size,
        metavar="N",
        help="questions per forward pass; auto finds a number that fits (default: %(default)s)",
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        metavar="DIR",
        help="keep answers and results here, in a folder of the checkpoint's name (default: evaluations/ in the "
        "checkpoint's folder)",
    )


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(number(int, least=1)(text))
