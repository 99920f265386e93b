"""The score of a model, as lm-eval gives it, and of a checkpoint, so that nothing of it is lost.

In: a checkpoint's folder, or a model with its tokenizer, and the tasks. Out: a dict with the score, the groups, the
single tasks, and the settings they belong to. Prompts, weighting and standard errors are lm-eval's own; ours is where
MMLU's questions come from (questions.py), how fast they are answered (scoring.py), that answers are kept as they come
(recorded.py, results_folder.py), and that whatever goes wrong is an error and never a score.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import lm_eval.evaluator
import torch
from blake3 import blake3
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.recorded import RecordedLM
from model_preparation.evaluation.results_folder import ResultsFolder
from model_preparation.evaluation.score_entry import enter_score, is_read_only
from model_preparation.evaluation.scored_model import find_model
from model_preparation.evaluation.scoring import ScoringLM
from model_preparation.evaluation.tasks import MMLU, Tasks, is_mmlu, load_tasks, name_of, quiet, short_name
from model_preparation.io.complete_file import make_folder
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.untrusted.untrusted_files import without_links
from model_preparation.versions import creation_time

SEED = 1234


def evaluate_checkpoint(
    directory: str | Path,
    *,
    tasks: Sequence[str] | Tasks = (MMLU,),
    limit: int | None = None,
    mmlu_data: str | Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    seed: int = SEED,
    parallelize: bool = False,
    results_dir: str | Path | None = None,
    tokenizer: str | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, or its base or donor, keeping every task's answers as they come.

    Killed anywhere, the same call goes on where it stopped and gives the same result. Called again when all is done, it
    gives what was found. A score of the whole task group mmlu is entered into the checkpoint's checkpoint_info.json.

    Args:
        directory: the checkpoint folder; or the name, folder or hub id of a model, to compare a checkpoint with.
        device, dtype, parallelize: as in `load_checkpoint`.
        tasks, limit, mmlu_data, num_fewshot, batch_size, seed: as in `evaluate_model`.
        results_dir: where to keep answers and results, in a folder of the checkpoint's name; by default in the
            checkpoint's own folder, in `evaluations/`. Needed for a model that is no checkpoint.
        tokenizer: for a model published without one, as Llamba is: name, folder or hub id.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Returns:
        As `evaluate_model`; and `model` (digests of weights, config and tokenizer), `weights` (one of all these),
        `date`, `results_dir` (the folder of this evaluation), `kept` (whether all was there already), `entered`
        (whether checkpoint_info.json has this score now); if results of another model were in that folder, `put_aside`
        (where they went) and `differing` (in what that model differs, in words).

    Raises:
        SurgeryError: as `load_checkpoint` and `evaluate_model`; what can be checked is, before the model is loaded.
        OSError: if results cannot be written.
    """
    scored = find_model(directory, tokenizer, sources=sources)
    root = scored.results_root(results_dir)
    dtype = torch_dtype(dtype)
    check_settings(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    loaded = tasks if isinstance(tasks, Tasks) else load_tasks(tasks, mmlu_data=mmlu_data, num_fewshot=num_fewshot)
    _make_root(root)
    settings = {
        **settings_of(loaded, limit, num_fewshot, batch_size, seed),
        "device": "parallelize" if parallelize else torch.device(device).type,
        "dtype": scored.dtype if dtype is None else str(dtype).removeprefix("torch."),
    }
    results = ResultsFolder(root, settings, scored.inputs)

    def load(advance: Callable[[int], None]) -> ScoringLM:
        return _scoring(*scored.load(device, dtype, parallelize), batch_size, advance)

    with results.held():
        result = results.result()
        # Of other tasks' data there is no digest to go by: their questions are put together, and compared.
        kept = result is not None and all(map(is_mmlu, loaded.names))
        if not kept:
            lm, tracker = RecordedLM(load, results), results.tracker()
            found = run_tasks(lm, loaded, settings, tracker, scored.name)
            samples = found.pop("samples")
            asked = {name: _digest(rows) for name, rows in samples.items()}
            kept = result is not None and not lm.asked and result["asked"] == asked
            if not kept:
                files = results.publish(tracker, found, samples)
                model = {"weights": results.weights, "model": results.model}
                result = {**_summary(found, loaded), "settings": settings, **model, "date": creation_time()}
                results.finish({**result, "asked": asked}, files)
    assert result is not None
    result = {name: value for name, value in result.items() if name not in ("asked", "files", "info_sha256")}
    result |= {"results_dir": str(results.folder), "kept": kept, "entered": False}
    if results.put_aside is not None:
        result |= {"put_aside": str(results.put_aside), "differing": results.differing}
    if scored.is_checkpoint:
        try:
            result["entered"] = enter_score(scored.folder, result, is_mmlu=loaded.names == (MMLU,))
        except OSError as error:
            if results_dir is None or not is_read_only(error):
                raise
    return result


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] | Tasks = (MMLU,),
    limit: int | None = None,
    mmlu_data: str | Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    seed: int = SEED,
) -> dict[str, Any]:
    """Score a model on lm-eval's tasks, on the device and in the dtype it has; nothing is kept on the disk.

    Args:
        tasks: names of lm-eval's tasks, groups or tags, or folders or files of task definitions; or what `load_tasks`
            made of them, `mmlu_data` being of no effect then.
        limit: questions per single task (of MMLU: per subject), from the first on; None takes all.
        mmlu_data: as in `find_questions`.
        num_fewshot: solved examples before each question; None leaves it to the task (none, for MMLU).
        batch_size: questions per forward pass; "auto" takes what fits.
        seed: of Python, NumPy, torch and the few-shot sampler.

    Returns:
        `score` and `stderr` of what was named, if that is one task or group (fractions; stderr is None where a single
        question has none), `metric` (which of its metrics that is), `questions`, `groups` and `subjects`: what the
        named groups consist of ({name: {"score", "stderr", "metric", "questions"}}; names of MMLU's without `mmlu_`),
        `tasks`: the same of what was named, `lm_eval_version`, `max_length` (tokens a prompt may have), `mmlu_data`
        (where MMLU's questions came from), `settings`: what decides on the scores beside the weights, digests of
        questions and of task files of your own among it.

    Raises:
        SurgeryError: for tasks or questions that are missing or malformed, a setting out of range, or logits that are
            not finite.
    """
    check_settings(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    loaded = tasks if isinstance(tasks, Tasks) else load_tasks(tasks, mmlu_data=mmlu_data, num_fewshot=num_fewshot)

    settings = {
        **settings_of(loaded, limit, num_fewshot, batch_size, seed),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    lm = RecordedLM(lambda advance: _scoring(model, tokenizer, batch_size, advance))
    return {**_summary(run_tasks(lm, loaded, settings), loaded), "settings": settings}


def _make_root(root: Path) -> None:
    try:
        make_folder(without_links(root))
        writable = os.access(root, os.W_OK | os.X_OK)
        reason = "" if writable else "it is read-only"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise SurgeryError(f"Results cannot be kept in {root} ({reason}). Name another folder with --results_dir.")


def _scoring(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str, advance: Callable[[int], None]
) -> ScoringLM:
    with quiet():
        return ScoringLM(model, tokenizer, batch_size, advance)


def check_settings(*, limit: int | None, num_fewshot: int | None, batch_size: int | str) -> None:
    """Raise SurgeryError for a number that is too small."""
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is None or (name == "batch_size" and value == "auto"):
            continue
        if not isinstance(value, int) or value < least:
            raise SurgeryError(f"{name} is {value}, but must be at least {least}. Give another number.")


def settings_of(
    loaded: Tasks, limit: int | None, num_fewshot: int | None, batch_size: int | str, seed: int
) -> dict[str, Any]:
    """What decides on a score beside the model."""
    if num_fewshot is None and all(map(is_mmlu, loaded.names)):
        num_fewshot = 0  # its definitions leave that open, and lm-eval takes none
    return {
        "tasks": [short_name(name) for name in loaded.names],
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "seed": seed,
        **({"questions": loaded.questions.digest} if loaded.questions else {}),
        **({"task_files": loaded.digests} if loaded.digests else {}),
        "lm_eval": lm_eval.__version__,
    }


def run_tasks(
    lm: LM,
    loaded: Tasks,
    settings: Mapping[str, Any],
    tracker: EvaluationTracker | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """lm-eval's own evaluation; `tracker` and `name` are for the files it may write afterwards."""
    seed = settings["seed"]
    # The commit it would record is that of the folder one happens to be in.
    with quiet(), patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None):
        return lm_eval.simple_evaluate(
            model=lm,
            model_args=None if name is None else {"pretrained": name},
            tasks=loaded.items,
            task_manager=loaded.manager,
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            batch_size=settings["batch_size"],
            device=settings["device"],
            evaluation_tracker=tracker,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """BLAKE3 over what was asked and what is right, from lm-eval's digests of each question."""
    names = ("doc_hash", "prompt_hash", "target_hash")
    return blake3("".join(sample[name] for sample in samples for name in names).encode()).hexdigest()


def _summary(found: Mapping[str, Any], loaded: Tasks) -> dict[str, Any]:
    """The part of lm-eval's results that people read."""
    items = {name_of(item): _row(found, name_of(item)) for item in loaded.items}
    groups = [group for item in loaded.items if isinstance(item, Group) for group in item.get_all_groups()]
    only = next(iter(items.values())) if len(items) == 1 else dict.fromkeys(("score", "stderr", "metric"))
    return {
        **only,
        "questions": sum(row["questions"] for row in items.values()),
        "tasks": items,
        "groups": {_short(group.name): _row(found, group.name) for group in groups},
        "subjects": {_short(name): _row(found, name) for name in loaded.leaves},
        "lm_eval_version": found["lm_eval_version"],
        "max_length": found["max_length"],
        **({"mmlu_data": loaded.questions.source} if loaded.questions else {}),
    }


def _row(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Score, standard error, metric and number of questions of a task or group; None where it has none."""
    row = found["results"][name]
    metrics = [key for key in row if "," in key and "_stderr," not in key]
    metric = min(metrics, key=lambda key: key != "acc,none", default=None)  # accuracy, else the first
    stderr = None if metric is None else row.get(metric.replace(",", "_stderr,"), "N/A")
    return {
        "score": None if metric is None else float(row[metric]),
        "stderr": None if stderr in (None, "N/A") else float(stderr),
        "metric": metric,
        "questions": row.get("sample_count", {}).get(metric, row.get("sample_len") or 0),
    }


def _short(name: str) -> str:
    return name.removeprefix("mmlu_") if is_mmlu(name) else name
