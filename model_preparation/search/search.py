"""Runs a whole search for the layers of a donor to graft into a base. It writes into the output folder:

journal.jsonl        a line per evaluation; an interrupted search continues from it
search_result.json   the combinations, the best first (result.py describes it); written last
report.html, *.png   the same content as a page and as plots
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from model_preparation.checkpoint.extract import extract_layers
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import write_file
from model_preparation.io.result_inputs import digest_of
from model_preparation.io.self_checksum import with_checksum
from model_preparation.search import checks, methods
from model_preparation.search.candidate_scores import BudgetSpent, CandidateScores, Scorer
from model_preparation.search.checks import DONOR_LAYERS, JOURNAL
from model_preparation.search.journal import Journal
from model_preparation.search.layer_sets import SearchSpace
from model_preparation.search.objective import Objective
from model_preparation.search.plan import describe, space_of
from model_preparation.search.progress import SearchProgress
from model_preparation.search.report import write_report
from model_preparation.search.result import search_result
from model_preparation.search.result_reader import RESULT
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import ACCURACY, KL, SearchSettings
from model_preparation.search.shared_scoring import SharedScorer

_MOST_WRITTEN = 10_000  # combinations in search_result.json; the journal has all

MakeScorer = Callable[[ScoringSetup], Scorer]
# A context manager for workers that score. It gives a function that makes a scorer, and the type of workers' device.
Workers = contextlib.AbstractContextManager[tuple[MakeScorer, str]]


def search_layers(
    settings: SearchSettings | None = None,
    *,
    workers: Workers | None = None,
    say: Callable[[str], None] = lambda line: None,
    dry_run: bool = False,
    overwrite: bool = False,
    **changes: Any,
) -> dict[str, Any] | None:
    """Search for the best layers to graft, or continue an interrupted search.

    After an interruption, the same call continues the search. It then ends with the same combinations and scores as
    without interruption, unless there is a budget in hours.

    Args:
        settings: the search's settings. `changes` replace its fields; without `settings`, `changes` are the fields.
        workers: where candidates are scored, such as `remote_scorer(...)`; by default in this process.
        say: gets the plan, line by line.
        dry_run: only check everything and describe the plan; nothing is written.
        overwrite: replace the result of another search in the output folder.

    Returns:
        The content of search_result.json; None for `dry_run`.

    Raises:
        SurgeryError: for settings that do not allow a search, if the folder has the result of another search, and if no
            combination could be evaluated.
        OSError: if the journal or the results cannot be written.
        TypeError: for a setting that does not exist.
    """
    settings = SearchSettings(**changes) if settings is None else replace(settings, **changes)
    checks.check_first(settings, overwrite=overwrite)
    here = contextlib.nullcontext((SharedScorer, None))
    with here if workers is None or dry_run else workers as (make_scorer, scored_on):
        folder = settings.folder
        extracts = settings.llama_layers_dir is None and not dry_run
        if extracts and checks.has_donor_layers(settings, overwrite=overwrite):
            settings, extracts = replace(settings, llama_layers_dir=folder / DONOR_LAYERS), False
        setup = ScoringSetup(settings, scored_on)
        pair = setup.pair
        space = space_of(setup, *checks.known_units(settings, pair.layers, pair.fixed, pair.units, say))
        if not overwrite:
            # The inputs' digests need all weights, which a dry run does not read.
            inputs = {} if dry_run else {"inputs": setup.inputs}
            checks.check_earlier(folder, {"settings": setup.recorded, **inputs})
        if extracts:  # only after the checks, because the layers take as much of the disk as the donor
            assert settings.donor is not None
            extract_layers(settings.donor, folder / DONOR_LAYERS, sources=settings.sources, overwrite=overwrite)
            setup.take_extracted(folder / DONOR_LAYERS)
        with contextlib.nullcontext() if dry_run else contextlib.closing(Journal(folder / JOURNAL)) as journal:
            for line in describe(setup, space):
                say(line)
            if journal is None:
                return None
            found, scores = _evaluate(setup, space, journal, make_scorer)
            write_report(found, scores, folder)
            found["final_results"] = found["final_results"][:_MOST_WRITTEN]
            write_file(folder / RESULT, with_checksum(found))
        return found


def _evaluate(
    setup: ScoringSetup, space: SearchSpace, journal: Journal, make_scorer: MakeScorer
) -> tuple[dict[str, Any], CandidateScores]:
    """Run the search method. Return the content of search_result.json, and all scores."""
    settings = setup.settings
    digest = _digest(setup)
    tasks = np.array([question.task for question in setup.questions.questions])
    objective = Objective(settings.objective, tasks, np.array(setup.questions.of_tasks(setup.second_leaves)))
    scorer = make_scorer(setup)
    donor = _donor(setup, scorer, journal, digest, objective)
    with SearchProgress() as progress:
        scores = CandidateScores(
            *(scorer, setup.questions, objective, journal, digest),
            total=space.total,
            settings=settings,
            progress=progress,
            units=space.units,
        )
        budget_spent = False
        try:
            methods.search(space, scores, settings)
        except BudgetSpent:
            budget_spent = True
    found = search_result(setup, space, scores, donor, budget_spent=budget_spent)
    if not found["final_results"]:
        reasons = "; ".join(
            f"{space.units.names(layers)}: {reason}" for layers, reason in list(scores.failed.items())[:3]
        )
        raise SurgeryError(
            f"No combination of {space.least} to {space.most} {space.units.word} was evaluated"
            + (f" ({reasons})" if reasons else "")
            + ". Give a larger --budget_evaluations or --budget_hours, or correct what failed. Evaluations are kept."
        )
    return found, scores


def _digest(setup: ScoringSetup) -> str:
    """The digest of everything that answers depend on. The whole donor is a part of it only for the objective kl."""
    objective = setup.settings.objective
    inputs = {name: digest for name, digest in setup.inputs.items() if name != "donor" or objective == KL}
    return digest_of({"settings": setup.recorded, "objective": objective, **inputs})[:16]


def _donor(
    setup: ScoringSetup, scorer: Scorer, journal: Journal, digest: str, objective: Objective
) -> dict[str, Any] | None:
    """The donor's own score on the same questions, if the donor is given. The score is kept in the journal."""
    if setup.settings.donor is None:
        return None
    kept_as = f"{digest} donor {setup.inputs['donor']}"
    for entry in journal.entries:
        if entry.get("settings") == kept_as and "fitness" in entry["donor"]:
            return entry["donor"]
    answers = scorer.donor_answers()
    right, fitness = (
        np.array(list(found(answers).values())) for found in (setup.questions.values, setup.questions.maximised)
    )
    donor = {
        "accuracy": float(right.mean()),
        "stderr": Objective(ACCURACY, objective.strata).stderr(right),
        "fitness": float(fitness.mean()),
    }
    journal.append({"settings": kept_as, "donor": donor})
    return donor
