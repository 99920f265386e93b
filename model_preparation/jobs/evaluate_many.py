"""Evaluates many checkpoints: test_checkpoint.py evaluates each in a process of its own.

test_checkpoint.py keeps results for each subject, so an interrupted evaluation continues where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.errors import SurgeryError
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.jobs.build_many import is_complete
from model_preparation.jobs.combinations import Combination
from model_preparation.jobs.jobs import Ended, Job, Runner, outcomes_of, run_in_turn
from model_preparation.jobs.process import short
from model_preparation.jobs.table import table

EVALUATOR = Path(__file__).resolve().parents[1] / "test_checkpoint.py"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, and the layers that it should have. `layers` is None if they are unknown."""

    folder: Path
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """The outcome for one checkpoint.

    `status` is evaluated, kept (all results existed already) or failed. `score` and `stderr` are fractions of 1. After
    a failure, `score`, `stderr` and `questions` are None, and `note` has the reason. `stderr` is also None if a subject
    has only one question. With several tasks, `score` is None, and `note` has the score of each task.
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
    """The given folders that are checkpoints, and the complete checkpoints inside the other given folders.

    Raises:
        SurgeryError: if a folder is no checkpoint and has none inside.
    """
    found: dict[Path, Candidate] = {}
    for path in given:
        folder = path.expanduser()
        folders = [folder]
        if folder.is_dir() and not is_complete(folder):
            # A build writes NAME.partial, which looks complete just before it is renamed to NAME.
            inside = (entry for entry in sorted(folder.iterdir()) if ".partial" not in entry.name)
            folders = [entry for entry in inside if is_complete(entry)]
            if not folders:
                raise SurgeryError(
                    what_it_is(folder)
                    or f"{folder} is not a complete checkpoint, and has none inside. "
                    "Give the folders of checkpoints, or a folder that holds them."
                )
        for folder in folders:
            read_info(folder)
            found.setdefault(folder.resolve(), Candidate(folder))
    return list(found.values())


def listed_checkpoints(combinations: Sequence[Combination], output_root: Path) -> list[Candidate]:
    """The checkpoints that create_best_checkpoints.py makes from a list, whether they are built already or not."""
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
    """Evaluate each candidate. An evaluation that fails does not stop the others.

    Args:
        candidates: checkpoints in different folders.
        flags: flags for the evaluator, as the user typed them: --limit 100, ...
        results_dir: gets one folder of results per checkpoint, with the checkpoint's name. By default,
            results go into the checkpoint's folder.
        needs: the paths in `flags`, which must exist on every machine.
        run_jobs: how evaluations run: `run_in_turn` or a `RayRunner`.
        evaluator: the Python file that evaluates one checkpoint.

    Raises:
        SurgeryError: if two candidates would put their results into one folder.
    """
    names = [candidate.folder.resolve().name for candidate in candidates]
    for name in names if results_dir is not None else []:
        if names.count(name) > 1:
            raise SurgeryError(
                f"{names.count(name)} checkpoints are named {name}, and would share {results_dir}/{name}. "
                "Evaluate them in two runs, or without --results_dir."
            )
    layers: dict[int, tuple[int, ...]] = {}
    prepared: list[Job | Evaluation] = []
    for number, (name, candidate) in enumerate(zip(names, candidates, strict=True)):
        try:
            layers[number] = _layers(candidate)
        except SurgeryError as error:
            print(f"{name}: {error}", flush=True)
            prepared.append(Evaluation(name, candidate.layers or (), "failed", 0.0, note=short(str(error))))
            continue
        arguments = ["--checkpoint", str(candidate.folder), "--full_eval", "--skip_generation", *flags]
        arguments += [] if results_dir is None else ["--results_dir", str(results_dir)]
        needed = (candidate.folder / INFO, *needs)
        prepared.append(Job(name, evaluator, tuple(arguments), needed, results_dir, "--result_json"))
    return outcomes_of(prepared, run_jobs, lambda number, ended: _evaluation(names[number], layers[number], ended))


def describe(evaluations: Sequence[Evaluation]) -> str:
    """A table with a row per evaluation."""
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
    """The checkpoint's layers. Raises SurgeryError if it is not complete, or has other layers than expected."""
    layers = tuple(read_info(candidate.folder)["replaced_layers"])
    if candidate.layers not in (None, layers):
        raise SurgeryError(
            f"The layers of {candidate.folder} are {' '.join(map(str, layers)) or 'none'}, not those of the list. "
            "Build it again with create_best_checkpoints.sh --overwrite, or name another --output_root."
        )
    return layers


def _evaluation(name: str, layers: tuple[int, ...], ended: Ended) -> Evaluation:
    if ended.reason:
        return Evaluation(name, layers, "failed", ended.seconds, note=ended.reason)
    result: dict[str, Any] = ended.result or {}
    try:
        status = "kept" if result["kept"] else "evaluated"
        note = "" if result["score"] is not None else "; ".join(_task_score(*task) for task in result["tasks"].items())
        score, stderr = (None if result[key] is None else float(result[key]) for key in ("score", "stderr"))
        return Evaluation(name, layers, status, ended.seconds, score, stderr, int(result["questions"]), note)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        note = f"the evaluator ended without a result ({error!r})"
        return Evaluation(name, layers, "failed", ended.seconds, note=note)


def _task_score(name: str, row: dict[str, Any]) -> str:
    return f"{name} none" if row["score"] is None else f"{name} {row['score']:.4f}"
