"""Everything that a search is asked for, with every default. The command's flags and Python fill it alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS = ("singles", "exhaustive", "greedy", "beam", "ga")
RACING_METHODS = ("greedy", "beam", "ga")  # candidates race here by default
# The settings that belong to one method; `top` belongs to all.
OPTIONS_OF = {"beam": ("beam_width",), "ga": ("seed", "population", "generations", "patience")}
ACCURACY, KL = OBJECTIVES = ("accuracy", "kl")


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, on which questions, and how.

    Attributes:
        output_dir: the folder of the journal and the results.
        base, tokenizer, sources: as `build_checkpoint` takes them.
        donor: the donor's name, folder or hub id. The objective `kl` needs it, and so does the donor's own score.
        llama_layers_dir: a folder that `extract_layers` wrote. By default the layers are extracted from `donor`.
        tasks, limit, mmlu_data, num_fewshot, batch_size: as `evaluate_checkpoint` takes them.
        device: where this process computes.
        dtype: torch's name of the dtype to run in; by default that of the checkpoints.
        objective: one of `OBJECTIVES`.
        method: one of `METHODS`.
        min_layers, max_layers: the size of a combination. `max_layers` is 4 by default, and 1 for singles.
        budget_evaluations: evaluate at most so many combinations; None sets no limit.
        budget_hours: evaluate for at most so many hours, all runs of this search together.
        race: whether to drop candidates early that are surely worse; None leaves it to the method.
        prior: a result file; its `single_layer_results` are taken as known.
        beam_width: how many combinations of each size beam search extends.
        seed, population, generations, patience: of the genetic algorithm. It stops after `patience` generations
            without a better combination.
        top: in a race, how many combinations singles and exhaustive score on all questions.
        memory_bytes: memory for the base's hidden states; the rest goes into a file in `output_dir`.
    """

    output_dir: str | Path
    base: str = "unaligned_llamba"
    donor: str | None = None
    llama_layers_dir: str | Path | None = None
    tokenizer: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("mmlu",)
    limit: int | None = None
    mmlu_data: str | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    device: str = "cpu"
    dtype: str | None = None
    objective: str = ACCURACY
    method: str = "beam"
    min_layers: int = 1
    max_layers: int | None = None
    budget_evaluations: int | None = None
    budget_hours: float | None = None
    race: bool | None = None
    prior: str | Path | None = None
    beam_width: int = 4
    seed: int = 0
    population: int = 40
    generations: int = 20
    patience: int = 4
    top: int = 10
    memory_bytes: int = 4_000_000_000

    @property
    def folder(self) -> Path:
        """`output_dir`, as a path."""
        return Path(self.output_dir)

    @property
    def most_layers(self) -> int:
        """`max_layers`, or its default."""
        return self.max_layers or (1 if self.method == "singles" else 4)

    @property
    def races(self) -> bool:
        """Whether candidates race."""
        return self.method in RACING_METHODS if self.race is None else self.race

    def described(self) -> dict[str, Any]:
        """What decides on the result, by the names of the flags. The prior file is described by name and digest."""
        from model_preparation.io.digests import blake3_of

        prior = None if self.prior is None else Path(self.prior)
        options = OPTIONS_OF.get(self.method, ("top",) if self.races and self.method != "greedy" else ())
        return {
            "method": self.method,
            "min_layers": self.min_layers,
            "max_layers": self.most_layers,
            "budget_evaluations": self.budget_evaluations,
            "budget_hours": self.budget_hours,
            "race": self.races,
            "prior": None if prior is None else f"{prior.name} ({blake3_of(prior)[:16]})",
            **{name: getattr(self, name) for name in options},
            "objective": self.objective,
        }
