"""All settings of a search, with their defaults. The command's flags and calls from Python fill the same class."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from model_preparation.command_line import number
from model_preparation.evaluation.settings import Haystack, Language, Lengths, auto_or_count
from model_preparation.setting_flags import CheckedSettings, Flag, OneOf

METHODS = ("singles", "exhaustive", "greedy", "beam", "ga", "removal", "ratio")
RACING_METHODS = ("greedy", "beam", "ga", "removal")  # in these methods, candidates race by default
# By method, the settings that only this method uses. For a method that is not here, `top` changes the result of a race.
OPTIONS_OF = {
    "greedy": (),
    "removal": (),
    "ratio": ("second_task",),
    "beam": ("beam_width",),
    "ga": ("seed", "population", "generations", "patience"),
}
LAYERS, HEADS = UNITS = ("layers", "heads")
ACCURACY, KL, NLL = OBJECTIVES = ("accuracy", "kl", "nll")


class _Gigabytes:
    """Reads a number of GB as a number of bytes."""

    def __call__(self, text: str) -> int:
        return int(number(float, least=0)(text) * 1e9)

    def text(self, size_bytes: float) -> str:
        return str(size_bytes / 1e9)


_COUNT = number(int, least=1)


@dataclass(frozen=True)
class SearchSettings(CheckedSettings):
    """The layers or heads to search, the questions and the method. The help of the flags explains the fields.

    Attributes:
        output_dir: the folder of the journal and the results.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.
        device: torch's name of the device on which this process computes.
        dtype: torch's name of the dtype to run in; by default the dtype of the checkpoints.
        race: whether candidates race; None means the method's default.

    Raises:
        SurgeryError: for a value that its flag does not take.
    """

    output_dir: str | Path
    base: Annotated[str, Flag("NAME|PATH", "the Llamba to graft into: a name, a model folder or a hub id")] = (
        "unaligned_llamba"
    )
    start: Annotated[
        str | Path | None, Flag("CHECKPOINT", "a checkpoint to graft into instead of --base; its grafted layers stay")
    ] = None
    donor: Annotated[
        str | None,
        Flag(
            "NAME|PATH", "the model that gives the layers; its score is shown too, and --objective kl needs the donor"
        ),
    ] = None
    llama_layers_dir: Annotated[
        str | Path | None,
        Flag(
            "DIR",
            "the donor's layers, written by extract_layers.py (default: extracted from --donor into OUTPUT_DIR)",
            Path,
        ),
    ] = None
    tokenizer: Annotated[str | None, Flag("NAME|PATH", "take the tokenizer from here (default: the base's own)")] = None
    sources: Mapping[str, str] = field(default_factory=dict)
    tasks: Annotated[
        tuple[str, ...],
        Flag(
            "TASK",
            "tasks, groups or tags of lm-eval; recall tasks such as kv_retrieval; or folders of task files, which may "
            "run code (default: mmlu)",
            nargs="+",
            name="task",
        ),
    ] = ("mmlu",)
    second_task: Annotated[
        str | None, Flag("TASK", "with --method ratio: a task on common knowledge; --task is then the recall task")
    ] = None
    lengths: Lengths = None
    language: Language = "en"
    haystack: Haystack = None
    limit: Annotated[int | None, Flag("N", "only the first N questions of every task", _COUNT)] = None
    mmlu_data: Annotated[str | None, Flag("DIR|hub|modelscope", "MMLU's questions, as for test_checkpoint.py")] = None
    num_fewshot: Annotated[int | None, Flag("K", "solved examples before each question", number(int, least=0))] = None
    batch_size: Annotated[
        int | str,
        Flag("N", "questions that run at once; in a race, N can change which candidates drop out", auto_or_count),
    ] = "auto"
    device: str = "cpu"
    dtype: str | None = None
    objective: Annotated[
        str,
        Flag(
            None,
            "accuracy: right answers; kl: closeness to the donor's predictions, with less noise; nll: minus the mean "
            "loss per token of the right answer",
            OneOf(*OBJECTIVES),
        ),
    ] = ACCURACY
    method: Annotated[str, Flag(None, "how combinations are chosen; the methods are above", OneOf(*METHODS))] = "beam"
    unit: Annotated[
        str,
        Flag(None, "the units of a combination: whole layers, or single query heads of the donor", OneOf(*UNITS)),
    ] = LAYERS
    max_heads: Annotated[
        int | None, Flag("N", "with --unit heads: the most heads of a combination (default: 4; for singles: 1)", _COUNT)
    ] = None
    keep_mixer_heads: Annotated[
        bool, Flag(None, "with --unit heads: leave the mixers whole, as for create_replaced_model_checkpoint.py")
    ] = False
    min_layers: Annotated[int, Flag("N", "the fewest layers of a combination", _COUNT)] = 1
    max_layers: Annotated[
        int | None, Flag("N", "the most layers of a combination (default: 4; for singles: 1)", _COUNT)
    ] = None
    budget_evaluations: Annotated[int | None, Flag("N", "evaluate at most N combinations", _COUNT)] = None
    budget_hours: Annotated[
        float | None,
        Flag("H", "evaluate for at most H hours in total, over all runs of this search", number(float, above=0)),
    ] = None
    max_cache_bytes: Annotated[
        int | None,
        Flag("N", "only combinations whose cache has at most N bytes for a sequence of --at_tokens tokens", _COUNT),
    ] = None
    at_tokens: Annotated[int | None, Flag("N", "the sequence's length for --max_cache_bytes", _COUNT)] = None
    race: Annotated[
        bool | None,
        Flag(
            None,
            "ask the questions in rounds; after each, a paired test drops candidates that are surely worse (default: "
            "off for singles, exhaustive and ratio; on for the others)",
            OneOf(auto=None, on=True, off=False),
        ),
    ] = None
    prior: Annotated[
        str | Path | None,
        Flag(
            "FILE",
            "the result of another search: its scores of single layers or heads count as known; with --unit heads also "
            "a list of heads, the best first: a head such as 13:16 on each line, or a JSON list. With a "
            "list, the search begins with each head alone and the first 1, 2, ... heads together; greedy, "
            "beam and ga continue from the good ones",
        ),
    ] = None
    beam_width: Annotated[int, Flag("N", "beam: combinations kept for each size", _COUNT)] = 4
    seed: Annotated[int, Flag("N", "ga: random seed, from 0", number(int, least=0))] = 0
    population: Annotated[int, Flag("N", "ga: combinations in a generation, at least 4", number(int, least=4))] = 40
    generations: Annotated[int, Flag("N", "ga: the most generations", _COUNT)] = 20
    patience: Annotated[int, Flag("N", "ga: stop after N generations without a better combination", _COUNT)] = 4
    top: Annotated[
        int, Flag("N", "combinations to print; a race of singles or exhaustive never drops the best N", _COUNT)
    ] = 10
    memory_bytes: Annotated[
        int,
        Flag(
            "GB",
            "memory for the base's hidden states; the rest goes into a file in OUTPUT_DIR",
            _Gigabytes(),
            name="boundary_memory",
        ),
    ] = 4_000_000_000

    @property
    def folder(self) -> Path:
        """`output_dir`, as a path."""
        return Path(self.output_dir)

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """`tasks` and `second_task`."""
        return self.tasks if self.second_task is None else (*self.tasks, self.second_task)

    @property
    def origin(self) -> str:
        """The model to graft into: `base`, or the checkpoint `start`."""
        return self.base if self.start is None else str(self.start)

    @property
    def most(self) -> int:
        """The most units of a combination: `max_layers` or `max_heads`, or the default."""
        return (self.max_heads if self.unit == HEADS else self.max_layers) or (1 if self.method == "singles" else 4)

    @property
    def races(self) -> bool:
        """Whether candidates race."""
        return self.method in RACING_METHODS if self.race is None else self.race

    def described(self) -> dict[str, Any]:
        """The settings that change the result, by flag. The prior file is described by name and digest."""
        from model_preparation.io.digests import blake3_of

        prior = None if self.prior is None else Path(self.prior)
        options = OPTIONS_OF.get(self.method, ("top",) if self.races else ())
        sizes: dict[str, Any] = {"min_layers": self.min_layers, "max_layers": self.most}
        if self.unit == HEADS:
            sizes = {"unit": HEADS, "max_heads": self.most}
        return {
            "method": self.method,
            **sizes,
            "budget_evaluations": self.budget_evaluations,
            "budget_hours": self.budget_hours,
            "max_cache_bytes": self.max_cache_bytes,
            "at_tokens": self.at_tokens,
            "race": self.races,
            "prior": None if prior is None else f"{prior.name} ({blake3_of(prior)[:16]})",
            **{name: getattr(self, name) for name in options},
            "objective": self.objective,
        }
