"""Which layers to graft: the search as a whole.

In: base, donor, tasks, a method. Out: OUTPUT_DIR with
    journal.jsonl        a line per evaluation; whatever is stopped goes on from it
    search_result.json   the combinations, the best first (result.py says what is in it); written last
    report.html, *.png   to look at
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from rich.filesize import decimal

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import check_settings
from model_preparation.evaluation.tasks import check_names
from model_preparation.files.new_file import write_file
from model_preparation.files.seal import seal
from model_preparation.files.timestamps import creation_time
from model_preparation.search import result as results
from model_preparation.search.cached_scoring import boundary_bytes, count_tokens
from model_preparation.search.evaluations import BudgetSpent, Evaluations, Scorer
from model_preparation.search.journal import Journal
from model_preparation.search.layer_sets import count_passes
from model_preparation.search.methods import METHODS, Options
from model_preparation.search.objective import ACCURACY, KL, OBJECTIVES, Objective
from model_preparation.search.parts import divide
from model_preparation.search.progress import SearchProgress, names
from model_preparation.search.report import write_report
from model_preparation.search.result_files import RESULT, read_single_layers
from model_preparation.search.setup import Setup, Spec
from model_preparation.search.space import Space
from model_preparation.surgery.layer_store import METADATA, LayerStore, extract_layers
from model_preparation.surgery.sources import resolve

JOURNAL, DONOR_LAYERS = "journal.jsonl", "donor_layers"
RACING = ("greedy", "beam", "ga")  # methods that race unless told not to
_MOST_WRITTEN = 10_000  # of the best combinations; the journal has all
_MOST_COUNTED = 1_000_000  # combinations up to which the plan counts layer passes

MakeScorer = Callable[[Setup], Scorer]


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


def search_layers(
    spec: Spec,
    search: Search,
    *,
    make_scorer: MakeScorer = lambda setup: setup.scorer(),
    say: Callable[[str], None] = lambda line: None,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Search, or go on with a search that was stopped; returns what search_result.json has, None for `dry_run`.

    Stopped anywhere, the same call goes on where it was and ends with the same combinations and scores as an
    uninterrupted one would have (a budget in hours aside, as clocks differ).

    Args:
        spec: what is searched and on what; `spec.folder` is the output folder.
        search: how.
        make_scorer: what answers the questions: a `CachedScorer`, or what spreads the same over machines.
        say: told the plan, line by line.
        dry_run: check everything and tell the plan only.

    Raises:
        SurgeryError: for what cannot be searched, and if no combination at all could be evaluated.
        OSError: if the journal or the results cannot be written.
    """
    _check(spec, search)
    folder = Path(spec.folder)
    check_output(folder)
    setup = Setup(spec)
    total = setup.pair.layers
    if search.most > total:
        raise SurgeryError(f"max_layers is {search.most}, but the base has {total} layers. Give --max_layers {total}.")
    parts = divide(setup.questions)
    space = Space(total, search.least, search.most)
    for line in describe(setup, search, space):
        say(line)
    if dry_run:
        return None
    digest = _digest(setup)
    journal = Journal(folder / JOURNAL)
    try:
        objective = Objective(spec.objective, np.array([question.task for question in setup.questions.questions]))
        donor = _donor(setup, journal, digest, objective)
        with SearchProgress() as progress:
            evaluations = Evaluations(
                make_scorer(setup),
                setup.questions,
                parts,
                objective,
                journal,
                digest,
                total=total,
                most=search.budget_evaluations,
                seconds=None if search.budget_hours is None else search.budget_hours * 3600,
                racing=search.races,
                progress=progress,
            )
            space = Space(total, search.least, search.most, _prior(search, evaluations, total))
            spent = False
            try:
                METHODS[search.method](space, evaluations, search.options)
            except BudgetSpent:
                spent = True
        found = _result(setup, search, evaluations, donor, spent)
        if not found["final_results"]:
            reasons = "; ".join(f"{names(layers)}: {reason}" for layers, reason in list(evaluations.failed.items())[:3])
            raise SurgeryError(
                f"No combination of {search.least} to {search.most} layers was evaluated"
                + (f" ({reasons})" if reasons else "")
                + ". Allow more by --budget_evaluations or --budget_hours, or mend what failed; what is known is kept."
            )
        write_report(found, evaluations, folder)
        found["final_results"] = found["final_results"][:_MOST_WRITTEN]
        write_file(folder / RESULT, seal(found))
        return found
    finally:
        journal.close()


def check_first(base: str, tasks: Sequence[str], output_dir: Path, sources: Mapping[str, str] | None = None) -> None:
    """Raise SurgeryError for what can be told before the donor is downloaded and its layers are extracted."""
    check_output(output_dir)
    check_names(tasks)
    resolve(base, overrides=sources)


def check_output(folder: Path) -> None:
    """Raise SurgeryError unless the folder is new, empty or a search's."""
    if folder.exists() and not folder.is_dir():
        raise SurgeryError(f"{folder} is a file. Give a folder as --output_dir.")
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if inside and not inside & {JOURNAL, RESULT, DONOR_LAYERS}:
        raise SurgeryError(
            f"{folder} holds other files ({', '.join(sorted(inside)[:3])}) and no {JOURNAL} of a search. "
            "Choose another --output_dir."
        )


def donor_layers(donor: str, output_dir: Path, sources: Mapping[str, str] | None = None) -> Path:
    """The donor's layers beside the search's results, extracted if they are not there."""
    folder = output_dir / DONOR_LAYERS
    if not (folder / METADATA).is_file():
        extract_layers(donor, folder, sources=sources)
    elif LayerStore(folder).metadata["model_name"] != donor:
        raise SurgeryError(
            f"{folder} holds the layers of {LayerStore(folder).metadata['model_name']}, not of {donor}. "
            "Choose another --output_dir."
        )
    return folder


def describe(setup: Setup, search: Search, space: Space) -> list[str]:
    """The plan in lines to print: what will be run, what it costs and what it saves."""
    spec, questions = setup.spec, setup.questions
    tokens = count_tokens(questions)
    size = boundary_bytes(setup.pair, questions)
    in_file = max(0, size - spec.memory_bytes)
    lines = [
        f"base        {setup.planned.base.folder}",
        f"donor       {setup.planned.donor.metadata['source']['id']} (layers in {setup.planned.donor.folder})",
        f"questions   {len(questions.questions):,} of {', '.join(spec.tasks)}, {tokens:,} tokens with padding",
        f"memory      {decimal(size)} for the base's hidden states before each of {space.total} layers"
        + (f", of which up to {decimal(in_file)} in a file in {spec.folder}" if in_file else "")
        + f"; at most {search.most + 1} more states of {decimal(size // space.total)}",
        f"method      {search.method}, {search.least} to {search.most} of {space.total} layers"
        + (", candidates race" if search.races else "")
        + f"; maximises {spec.objective}",
        f"candidates  {space.count:,}"
        + (
            ""
            if search.budget_evaluations is None
            else f", of which at most {search.budget_evaluations:,} are evaluated"
        ),
    ]
    known = {"singles": space.singles, "exhaustive": space.all()}.get(search.method)
    count = space.total if search.method == "singles" else space.count
    if known is not None and search.budget_evaluations is None and count <= _MOST_COUNTED:
        passes = count_passes(known, space.total)
        lines.append(
            f"cost        {passes:,} layer passes, where each combination alone would take {count * space.total:,}: "
            f"{1 - passes / (count * space.total):.0%} saved"
        )
    else:
        lines.append(
            f"cost        {space.total} layer passes for the base; a combination starts at its lowest grafted layer, "
            f"and shares what it has in common with others (alone, each takes {space.total})"
        )
    return lines


def _check(spec: Spec, search: Search) -> None:
    check_settings(limit=spec.limit, num_fewshot=spec.num_fewshot, batch_size=spec.batch_size)
    if search.method not in METHODS:
        raise SurgeryError(f"{search.method!r} is no method. Choose one of {', '.join(METHODS)}.")
    if search.method == "singles" and search.least > 1:
        raise SurgeryError(
            f"The method singles tries one layer at a time, and min_layers is {search.least}. Choose another --method."
        )
    if not 1 <= search.least <= search.most:
        raise SurgeryError(f"min_layers {search.least} and max_layers {search.most} do not fit. Give 1 <= min <= max.")
    if search.method == "singles" and search.least > 1:
        raise SurgeryError(f"The method singles grafts one layer, min_layers is {search.least}. Leave that out.")
    if spec.objective not in OBJECTIVES:
        raise SurgeryError(f"{spec.objective!r} is no objective. Choose one of {', '.join(OBJECTIVES)}.")
    if spec.objective == KL and spec.donor is None:
        raise SurgeryError("The objective kl compares with the donor itself, which is not named. Name it by --donor.")


def _digest(setup: Setup) -> str:
    """Of everything that decides on an evaluation."""
    content = {"settings": setup.settings, "objective": setup.spec.objective, **setup.digests}
    if setup.spec.objective == KL:
        content["donor"] = setup.spec.donor
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _prior(search: Search, evaluations: Evaluations, total: int) -> dict[int, float]:
    """Gains of single layers that are known beforehand."""
    if search.prior is None:
        return {}
    scores = read_single_layers(Path(search.prior))
    outside = [layer for layer in scores if layer >= total]
    if outside:
        raise SurgeryError(
            f"{search.prior} has a score for layer {outside[0]}, but the base has {total} layers. "
            "It is of another model: give another --prior."
        )
    middle = sum(scores.values()) / len(scores)  # its base's score is not known; only the order of gains counts
    return {layer: score - middle for layer, score in sorted(scores.items())}


def _donor(setup: Setup, journal: Journal, digest: str, objective: Objective) -> dict[str, Any] | None:
    """The donor's own score on the same questions, if the donor is at hand; journaled like all others."""
    if setup.spec.donor is None:
        return None
    for entry in journal.entries:
        if entry["settings"] == f"{digest} donor":
            return entry["donor"]
    values = np.array(list(setup.questions.values(setup.donor_answers()).values()))
    stderr = Objective(ACCURACY, objective.strata).stderr(values)
    donor = {"accuracy": float(values.mean()), "stderr": stderr}
    journal.append({"settings": f"{digest} donor", "donor": donor})
    return donor


def _result(
    setup: Setup, search: Search, evaluations: Evaluations, donor: dict[str, Any] | None, spent: bool
) -> dict[str, Any]:
    spec, config, item_bytes = setup.spec, setup.pair.model.config, setup.pair.model.dtype.itemsize
    rows = results.final_results(evaluations, config, item_bytes, search.least)
    base = results.base_row(evaluations, config, item_bytes)
    donor_score = None if donor is None else donor["accuracy"] if spec.objective == ACCURACY else 0.0
    return {
        "objective": spec.objective,
        "final_results": rows,
        "pareto": results.pareto_front(rows, base),
        "base_score": base["fitness"],
        "base": os.path.abspath(spec.base) if Path(spec.base).exists() else spec.base,
        "base_stderr": base["stderr"],
        "base_accuracy": base["accuracy"],
        "donor_score": donor_score,
        "donor_accuracy": None if donor is None else donor["accuracy"],
        "donor": spec.donor,
        "llama_layers_dir": os.path.abspath(spec.llama_layers_dir),
        "tokenizer": spec.tokenizer,
        "questions": len(setup.questions.questions),
        "total_layers": setup.pair.layers,
        "single_layer_results": results.single_layer_results(evaluations, setup.pair.layers),
        "dropped": results.dropped(evaluations),
        "failed": [{"layers": list(layers), "reason": reason} for layers, reason in evaluations.failed.items()],
        "statistics": {**evaluations.statistics(), "budget_spent": spent},
        "search": asdict(search),
        "settings": {**setup.settings, "digests": setup.digests},
        "date": creation_time(),
    }
