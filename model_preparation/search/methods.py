"""The methods: which combinations are evaluated, in which order.

In: a `Space`, and `Evaluations` to ask. Out: nothing; all that is known is in the evaluations. They are our own, as the
libraries for genetic algorithms (DEAP, pymoo, PyGAD) score one individual at a time, while here a whole generation has
to be asked at once for its members to share their layers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_preparation.io.digests import blake3_of
from model_preparation.search.evaluations import BASE, Evaluations
from model_preparation.search.genetic import genetic
from model_preparation.search.layer_sets import LayerSet
from model_preparation.search.refinement import refine
from model_preparation.search.space import Space

RACING = ("greedy", "beam", "ga")  # methods that race unless told not to
# Which method an option belongs to; `top` is of all.
OPTIONS_OF = {"beam": ("beam_width",), "ga": ("seed", "population", "generations", "patience")}


@dataclass(frozen=True)
class Options:
    """What the methods can be told.

    Attributes:
        seed: of what is drawn.
        beam_width: combinations of each size that beam search goes on from.
        population, generations, patience: of the genetic algorithm; it stops after `patience` generations in which the
            best has not become better.
        top: combinations that have to be evaluated on all questions where candidates race.
    """

    seed: int = 0
    beam_width: int = 4
    population: int = 40
    generations: int = 20
    patience: int = 4
    top: int = 10


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        method: one of `METHODS`.
        least, most: layers of a combination.
        budget_evaluations: combinations that may be evaluated; None for any number.
        budget_hours: that evaluations may take in all.
        racing: whether candidates that are surely worse are dropped early; None leaves it to the method.
        prior: a result file whose `single_layer_results` are known beforehand.
        options: of the method.
    """

    method: str = "beam"
    least: int = 1
    most: int = 4
    budget_evaluations: int | None = None
    budget_hours: float | None = None
    racing: bool | None = None
    prior: str | None = None
    options: Options = field(default_factory=Options)

    @property
    def races(self) -> bool:
        return self.method in RACING if self.racing is None else self.racing

    def described(self) -> dict[str, Any]:
        """What decides on the result, by the command's flags; of the prior file the name and a digest."""
        prior = None if self.prior is None else Path(self.prior)
        counting = OPTIONS_OF.get(self.method, ("top",) if self.races and self.method != "greedy" else ())
        return {
            "method": self.method,
            "min_layers": self.least,
            "max_layers": self.most,
            "budget_evaluations": self.budget_evaluations,
            "budget_hours": self.budget_hours,
            "race": self.races,
            "prior": None if prior is None else f"{prior.name} ({blake3_of(prior)[:16]})",
            **{name: getattr(self.options, name) for name in counting},
        }


def singles(space: Space, evaluations: Evaluations, options: Options) -> None:
    """Every layer by itself."""
    evaluations.evaluate(space.singles, options.top)


def exhaustive(space: Space, evaluations: Evaluations, options: Options) -> None:
    """Every combination."""
    evaluations.evaluate(space.all(), options.top)


def greedy(space: Space, evaluations: Evaluations, options: Options) -> None:
    """Layer after layer, each time the one that adds most."""
    _grow(space, evaluations, 1)


def beam(space: Space, evaluations: Evaluations, options: Options) -> None:
    """Layer after layer from the best few of each size; then what is one layer away from the best."""
    _grow(space, evaluations, options.beam_width)
    refine(space, evaluations)


def ga(space: Space, evaluations: Evaluations, options: Options) -> None:
    """A genetic algorithm; then what is one layer away from the best."""
    rng = random.Random(options.seed)
    genetic(space, evaluations, rng, options.population, options.generations, options.patience)
    refine(space, evaluations)


METHODS: dict[str, Callable[[Space, Evaluations, Options], None]] = {
    "singles": singles,
    "exhaustive": exhaustive,
    "greedy": greedy,
    "beam": beam,
    "ga": ga,
}


def _grow(space: Space, evaluations: Evaluations, width: int) -> None:
    kept: list[LayerSet] = [BASE]
    for size in range(1, space.most + 1):
        if size == 1 and len(space.prior) == space.total:  # all singles are known beforehand
            kept = sorted(space.singles, key=lambda layers: (-space.prior[layers[0]], layers))[:width]
            continue
        more = dict.fromkeys(new for layers in kept for new in space.with_one_more(layers))
        share = evaluations.room // (space.most - size + 1) if size > 1 and evaluations.room is not None else len(more)
        wanted = space.by_promise(more, evaluations)[: max(share, width)]
        kept = evaluations.evaluate(wanted, width)[:width]
