"""Scores of many checkpoints, each evaluated by test_checkpoint.py in a process of its own.

In: checkpoint folders and the evaluator's flags. Out: an `Evaluation` for each, in the same order. The evaluator keeps
its results per subject, so what was cut short goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.errors import SurgeryError
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.jobs.combinations import Combination
from model_preparation.jobs.existing import is_complete
from model_preparation.jobs.jobs import Ended, Job, Runner, run_in_turn, short
from model_preparation.jobs.table import table

EVALUATOR = Path(__file__).resolve().parents[1] / "test_checkpoint.py"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to be evaluated, and the layers it should have; None if that is not known."""

    folder: Path
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """What became of one: evaluated, kept (everything was there already) or failed, for the reason in `note`.

    `score` and `stderr` are fractions of 1; they and `questions` are None where it failed, `stderr` also where a
    subject has one question only. Of several tasks `score` is None too, and `note` has each one's.
    """

    name: str
    layers: tuple[int, ...]
    status: str
    seconds: float
    score: float | None = None
    stderr: float | None = None
    questions: int | None = None
    note: str = ""


def find_checkpoints(given: Sequence[Path]) -> list[Candidate]:
    """The checkpoints among the folders given, and all complete ones directly in those that are none themselves.

    Raises:
        SurgeryError: for a folder that neither is a checkpoint nor holds one.
    """
    found: dict[Path, Candidate] = {}
    for path in given:
        folder = path.expanduser()
        folders = [folder]
        if folder.is_dir() and not is_complete(folder):
            # A build makes NAME.partial, and the mark in it just before it is renamed.
            inside = (entry for entry in sorted(folder.iterdir()) if ".partial" not in entry.name)
            folders = [entry for entry in inside if is_complete(entry)]
            if not folders:
                raise SurgeryError(
                    what_it_is(folder)
                    or f"{folder} is no complete checkpoint, and there is none in it. "
                    "Give checkpoints' folders, or one that holds them."
                )
        for folder in folders:
            read_info(folder)
            found.setdefault(folder.resolve(), Candidate(folder))
    return list(found.values())


def listed_checkpoints(combinations: Sequence[Combination], output_root: Path) -> list[Candidate]:
    """The checkpoints that create_best_checkpoints.py makes of a list, built or not."""
    return [Candidate(output_root / combination.name, combination.layers) for combination in combinations]


def evaluate_all(
    candidates: Sequence[Candidate],
    flags: Sequence[str] = (),
    *,
    results_dir: Path | None = None,
    needs: Sequence[Path] = (),
    run_jobs: Runner = run_in_turn,
    evaluator: Path = EVALUATOR,
) -> list[Evaluation]:
    """Evaluate each candidate; one that fails stops no other.

    Args:
        candidates: with different folders.
        flags: of the evaluator, as typed: --limit 100, ...
        results_dir: where the evaluator keeps the results of a checkpoint, in a folder of its name; by default in the
            checkpoint.
        needs: paths that the flags name, which every machine must see.
        run_jobs: how the evaluations are run: `run_in_turn`, or a `ray_jobs.RayRunner`.
        evaluator: the command that evaluates one.

    Raises:
        SurgeryError: if two candidates would put their results into one folder.
    """
    names = [candidate.folder.resolve().name for candidate in candidates]
    for name in names if results_dir is not None else []:
        if names.count(name) > 1:
            raise SurgeryError(
                f"{names.count(name)} checkpoints are named {name}, and would share {results_dir}/{name}. "
                "Evaluate them apart, or without --results_dir."
            )
    evaluations: dict[int, Evaluation] = {}
    jobs: dict[int, Job] = {}
    layers: dict[int, tuple[int, ...]] = {}
    for number, (name, candidate) in enumerate(zip(names, candidates, strict=True)):
        try:
            layers[number] = _layers(candidate)
        except SurgeryError as error:
            print(f"{name}: {error}", flush=True)
            evaluations[number] = Evaluation(name, candidate.layers or (), "failed", 0.0, note=short(str(error)))
            continue
        arguments = ["--checkpoint", str(candidate.folder), "--full_eval", "--skip_generation", *flags]
        arguments += [] if results_dir is None else ["--results_dir", str(results_dir)]
        mark = candidate.folder / INFO
        jobs[number] = Job(name, evaluator, tuple(arguments), (mark, *needs), results_dir, "--result_json")
    numbers = list(jobs)
    for index, ended in run_jobs(list(jobs.values())):
        number = numbers[index]
        evaluations[number] = _evaluation(names[number], layers[number], ended)
    return [evaluations[number] for number in range(len(candidates))]


def describe(evaluations: Sequence[Evaluation]) -> str:
    """The table of scores."""
    rows = []
    for evaluation in evaluations:
        score = "" if evaluation.score is None else f"{evaluation.score:.4f}"
        score += "" if evaluation.stderr is None else f" ± {evaluation.stderr:.4f}"
        questions = "" if evaluation.questions is None else f"{evaluation.questions:,}"
        layers = " ".join(map(str, evaluation.layers)) or "none"
        seconds = f"{evaluation.seconds:.1f}"
        rows.append((evaluation.name, layers, score, questions, seconds, evaluation.status, evaluation.note))
    return table(("name", "layers", "score", "questions", "seconds", "status", "note"), rows)


def _layers(candidate: Candidate) -> tuple[int, ...]:
    """The checkpoint's layers; raises SurgeryError if it is not complete, or not of the layers it should have."""
    layers = tuple(read_info(candidate.folder)["replaced_layers"])
    if candidate.layers not in (None, layers):
        raise SurgeryError(
            f"The layers of {candidate.folder} are {' '.join(map(str, layers)) or 'none'}, not those of the list. "
            "Build it anew with create_best_checkpoints.sh --overwrite, or name another --output_root."
        )
    return layers


def _evaluation(name: str, layers: tuple[int, ...], ended: Ended) -> Evaluation:
    if ended.reason:
        return Evaluation(name, layers, "failed", ended.seconds, note=ended.reason)
    result: dict[str, Any] = ended.result or {}
    try:
        status = "kept" if result["kept"] else "evaluated"
        # Of several tasks there is no one score.
        note = "" if result["score"] is not None else "; ".join(_task_score(*task) for task in result["tasks"].items())
        score, stderr = (None if result[key] is None else float(result[key]) for key in ("score", "stderr"))
        return Evaluation(name, layers, status, ended.seconds, score, stderr, int(result["questions"]), note)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        note = f"the evaluator ended without a result ({error!r})"
        return Evaluation(name, layers, "failed", ended.seconds, note=note)


def _task_score(name: str, row: dict[str, Any]) -> str:
    return f"{name} none" if row["score"] is None else f"{name} {row['score']:.4f}"
