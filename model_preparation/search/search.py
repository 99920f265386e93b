"""Which layers to graft: the search as a whole.

In: base, donor, tasks, a method. Out: OUTPUT_DIR with
    journal.jsonl        a line per evaluation; whatever is stopped goes on from it
    search_result.json   the combinations, the best first (result.py says what is in it); written last
    report.html, *.png   to look at
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model_preparation.checkpoint.digests import digest_of_layers
from model_preparation.checkpoint.extract import extract_layers
from model_preparation.checkpoint.layer_store import METADATA, LayerStore, ModelLayers
from model_preparation.checkpoint.model_configs import type_and_depth
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.settings import EvaluationSettings
from model_preparation.hub.sources import resolve
from model_preparation.io.complete_file import write_file
from model_preparation.io.identity import differences, digest_of
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.untrusted.untrusted_files import without_links
from model_preparation.search import result as results
from model_preparation.search.costs import bounds
from model_preparation.search.earlier import check_earlier
from model_preparation.search.evaluations import BudgetSpent, Evaluations, Scorer
from model_preparation.search.journal import Journal
from model_preparation.search.methods import METHODS, Search
from model_preparation.search.objective import ACCURACY, KL, OBJECTIVES, Objective
from model_preparation.search.parts import divide
from model_preparation.search.plan import describe
from model_preparation.search.progress import SearchProgress, names
from model_preparation.search.question_set import check_tasks
from model_preparation.search.report import write_report
from model_preparation.search.result_files import RESULT, read_single_layers
from model_preparation.search.setup import Setup, Spec
from model_preparation.search.space import Space
from model_preparation.versions import creation_time

JOURNAL, DONOR_LAYERS = "journal.jsonl", "donor_layers"
_MOST_WRITTEN = 10_000  # of the best combinations; the journal has all

MakeScorer = Callable[[Setup], Scorer]


def search_layers(
    spec: Spec,
    search: Search,
    *,
    make_scorer: MakeScorer = lambda setup: setup.scorer(),
    say: Callable[[str], None] = lambda line: None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Search, or go on with a search that was stopped; returns what search_result.json has, None for `dry_run`.

    Stopped anywhere, the same call goes on where it was and ends with the same combinations and scores as an
    uninterrupted one would have (a budget in hours aside, as clocks differ).

    Args:
        spec: what is searched and on what; `spec.folder` is the output folder.
        search: how.
        make_scorer: what answers the questions: a `CachedScorer`, or what spreads the same over machines.
        say: told the plan, line by line.
        dry_run: check everything and tell the plan only; nothing is written.
        overwrite: replace the result of another search that is in the folder.

    Raises:
        SurgeryError: for what cannot be searched, if the folder has another search's result, and if no combination at
            all could be evaluated.
        OSError: if the journal or the results cannot be written.
    """
    check_first(spec, search, overwrite=overwrite)
    folder = Path(spec.folder)
    is_to_extract = spec.llama_layers_dir is None and not dry_run
    if is_to_extract and has_donor_layers(spec, overwrite=overwrite):
        spec, is_to_extract = replace(spec, llama_layers_dir=str(folder / DONOR_LAYERS)), False
    setup = Setup(spec)
    space = Space(setup.pair.layers, search.least, search.most, known_gains(search, setup.pair.layers, say))
    if not overwrite:  # a dry run reads no weights
        check_earlier(folder, {"settings": setup.settings, **({} if dry_run else {"inputs": setup.inputs})})
    if is_to_extract:  # only now, as it takes as much disk as the donor
        assert spec.donor is not None
        extract_layers(spec.donor, folder / DONOR_LAYERS, sources=spec.sources, overwrite=overwrite)
        setup.take_extracted(folder / DONOR_LAYERS)
    with contextlib.nullcontext() if dry_run else contextlib.closing(Journal(folder / JOURNAL)) as journal:
        for line in describe(setup, search, space):
            say(line)
        if journal is None:
            return None
        found, evaluations = _search(setup, search, space, journal, make_scorer)
        write_report(found, evaluations, folder)
        found["final_results"] = found["final_results"][:_MOST_WRITTEN]
        write_file(folder / RESULT, with_checksum(found))
    return found


def check_first(spec: Spec, search: Search, *, overwrite: bool = False) -> None:
    """Raise SurgeryError for what can be told before the donor is downloaded, and anything is extracted or loaded."""
    _check(spec, search)
    folder = Path(spec.folder)
    check_output(folder)
    if search.prior is not None:
        read_single_layers(Path(search.prior))
    if not overwrite:
        check_earlier(folder, {"search": _asked(spec, search)})
    check_tasks(spec.tasks)
    base = resolve(spec.base, overrides=spec.sources).folder
    _, total = type_and_depth(base)
    if search.most > total:
        raise SurgeryError(f"max_layers is {search.most}, but the base has {total} layers. Give --max_layers {total}.")
    _check_budget(search, bounds(Space(total, search.least, search.most, known_gains(search, total)), search).before)


def check_output(folder: Path) -> None:
    """Raise SurgeryError unless the folder is new, empty or a search's, and without links."""
    if folder.exists() and not folder.is_dir():
        raise SurgeryError(f"{folder} is a file. Give a folder as --output_dir.")
    inside = {path.name for path in without_links(folder.resolve()).iterdir()} if folder.is_dir() else set()
    if inside and not inside & {JOURNAL, RESULT, DONOR_LAYERS}:
        raise SurgeryError(
            f"{folder} holds other files ({', '.join(sorted(inside)[:3])}) and no {JOURNAL} of a search. "
            "Choose another --output_dir."
        )


def has_donor_layers(spec: Spec, *, overwrite: bool) -> bool:
    """Whether the donor's layers are beside the search's results.

    Raises:
        SurgeryError: if the layers there are those of another donor, and not to be replaced.
    """
    folder = Path(spec.folder) / DONOR_LAYERS
    if not (folder / METADATA).is_file():
        return False
    assert spec.donor is not None
    there, donor = LayerStore(folder), ModelLayers(resolve(spec.donor, overrides=spec.sources))
    asked = digest_of_layers(donor, range(donor.config.num_hidden_layers))
    odd = differences({"layer": digest_of_layers(there, there.layers)}, {"layer": asked})
    if odd and not overwrite:
        raise SurgeryError(
            f"{folder} holds the layers of another donor than {spec.donor} is now: {'; '.join(odd[:3])}"
            f"{', ...' * (len(odd) > 3)}. Choose another --output_dir, or add --overwrite."
        )
    return not odd


def _check(spec: Spec, search: Search) -> None:
    # It refuses numbers that are too small.
    EvaluationSettings(limit=spec.limit, num_fewshot=spec.num_fewshot, batch_size=spec.batch_size)
    if search.method not in METHODS:
        raise SurgeryError(f"{search.method!r} is no method. Choose one of {', '.join(METHODS)}.")
    if search.method == "singles" and search.least > 1:
        raise SurgeryError(
            f"The method singles tries one layer at a time, and min_layers is {search.least}. Choose another --method."
        )
    if not 1 <= search.least <= search.most:
        raise SurgeryError(f"min_layers {search.least} and max_layers {search.most} do not fit. Give 1 <= min <= max.")
    if spec.objective not in OBJECTIVES:
        raise SurgeryError(f"{spec.objective!r} is no objective. Choose one of {', '.join(OBJECTIVES)}.")
    if spec.objective == KL and spec.donor is None:
        raise SurgeryError("The objective kl compares with the donor itself, which is not named. Name it by --donor.")
    if spec.donor is None and spec.llama_layers_dir is None:
        raise SurgeryError("The donor is not named. Name it by --donor, or its extracted layers by --llama_layers_dir.")


def _check_budget(search: Search, before: int) -> None:
    """Refuse a budget that is spent on smaller sets; `before` evaluations come first even if it is small."""
    if search.budget_evaluations is not None and search.budget_evaluations <= before:
        raise SurgeryError(
            f"The method {search.method} evaluates {before} smaller set{'s' * (before != 1)} before one of "
            f"{search.least} layers, and budget_evaluations is {search.budget_evaluations}. "
            f"Give --budget_evaluations {before + 1} at least, or --method exhaustive."
        )


def _digest(setup: Setup) -> str:
    """Of everything that decides on an evaluation; all of the donor does only where candidates are compared with it."""
    inputs = dict(setup.inputs)
    if setup.spec.objective != KL:
        del inputs["donor"]
    return digest_of({"settings": setup.settings, "objective": setup.spec.objective, **inputs})[:16]


def known_gains(search: Search, total: int, say: Callable[[str], None] = lambda line: None) -> dict[int, float]:
    """Gains of single layers that are known beforehand, by layer; told what is left out of them."""
    if search.prior is None:
        return {}
    scores, left_out = read_single_layers(Path(search.prior))
    if left_out:
        say(
            f"{left_out} of {left_out + len(scores)} single layers in {search.prior} left out: "
            "their score is 0, which older programs gave what failed"
            + (", and single layers are evaluated" if len(scores) < total else "")
        )
    outside = [layer for layer in scores if layer >= total]
    if outside:
        raise SurgeryError(
            f"{search.prior} has a score for layer {outside[0]}, but the base has {total} layers. "
            "It is of another model: give another --prior."
        )
    middle = sum(scores.values()) / len(scores)  # its base's score is not known; only the order of gains counts
    return {layer: score - middle for layer, score in sorted(scores.items())}


def _asked(spec: Spec, search: Search) -> dict[str, Any]:
    """What decides on the result and is known before anything is loaded, as it stands in the result."""
    return {**search.described(), "objective": spec.objective}


def _place(name: str | None) -> str | None:
    """The absolute path of what is on the disk; names and hub ids as they are."""
    return os.path.abspath(name) if name is not None and Path(name).exists() else name


def _search(
    setup: Setup, search: Search, space: Space, journal: Journal, make_scorer: MakeScorer
) -> tuple[dict[str, Any], Evaluations]:
    """Evaluate; gives what search_result.json has."""
    digest = _digest(setup)
    objective = Objective(setup.spec.objective, np.array([question.task for question in setup.questions.questions]))
    scorer = make_scorer(setup)
    donor = _donor(setup, scorer, journal, digest, objective)
    with SearchProgress() as progress:
        evaluations = Evaluations(
            scorer,
            setup.questions,
            divide(setup.questions),
            objective,
            journal,
            digest,
            total=space.total,
            most=search.budget_evaluations,
            seconds=None if search.budget_hours is None else search.budget_hours * 3600,
            racing=search.races,
            progress=progress,
        )
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
    return found, evaluations


def _donor(setup: Setup, scorer: Scorer, journal: Journal, digest: str, objective: Objective) -> dict[str, Any] | None:
    """The donor's own score on the same questions, if the donor is at hand; journaled like all others."""
    if setup.spec.donor is None:
        return None
    kept_as = f"{digest} donor {setup.inputs['donor']}"
    for entry in journal.entries:
        if entry.get("settings") == kept_as:
            return entry["donor"]
    values = np.array(list(setup.questions.values(scorer.donor_answers()).values()))
    stderr = Objective(ACCURACY, objective.strata).stderr(values)
    donor = {"accuracy": float(values.mean()), "stderr": stderr}
    journal.append({"settings": kept_as, "donor": donor})
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
        "base": _place(spec.base),
        "base_stderr": base["stderr"],
        "base_accuracy": base["accuracy"],
        "donor_score": donor_score,
        "donor_accuracy": None if donor is None else donor["accuracy"],
        "donor": _place(spec.donor),
        "llama_layers_dir": os.path.abspath(setup.planned.donor.folder),
        "tokenizer": spec.tokenizer,
        "questions": len(setup.questions.questions),
        "total_layers": setup.pair.layers,
        "single_layer_results": results.single_layer_results(evaluations, setup.pair.layers),
        "dropped": results.dropped(evaluations),
        "failed": [{"layers": list(layers), "reason": reason} for layers, reason in evaluations.failed.items()],
        "statistics": {**evaluations.statistics(), "budget_spent": spent},
        "search": _asked(spec, search),
        "settings": setup.settings,
        "inputs": setup.inputs,
        "date": creation_time(),
    }
