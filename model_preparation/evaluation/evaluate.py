"""Score models with lm-eval. `evaluate_checkpoint` also writes the answers to the disk (see resumable_lm.py).

lm-eval itself makes the prompts, averages the scores of groups, and computes standard errors. If something fails, an
error is raised and no score is given.
"""

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import lm_eval.evaluator
import torch
from blake3 import blake3
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.creation_time import creation_time
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import ScoredModel, find_model, served_model
from model_preparation.evaluation.recall_tasks import (
    DOCUMENTS,
    EMBEDDED_RECALL,
    RecallRecipe,
    RecallTask,
    is_embedded,
    is_recall,
    longest_document,
    recall_names,
    takes,
)
from model_preparation.evaluation.results_folder import ResultsFolder, chosen_metric
from model_preparation.evaluation.resumable_lm import ResumableLM
from model_preparation.evaluation.scoring_lm import ScoringLM
from model_preparation.evaluation.settings import EvaluationSettings
from model_preparation.evaluation.suites import tasks_of_suite
from model_preparation.evaluation.tasks import MMLU, Tasks, is_mmlu, load_tasks, name_of, quiet, short_name
from model_preparation.io.complete_file import make_folder, write_file
from model_preparation.io.folder_lock import Hold, take
from model_preparation.io.result_inputs import differences
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

_LOADING_SETTINGS = ("device", "dtype", "parallelize", "results_dir", "tokenizer", "sources", "server", "model")
_SCORE_FIELDS = ("score", "stderr", "questions", "lm_eval_version", "settings", "weights", "model", "date")
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_WAIT_SECONDS = 10  # the longest wait while another evaluation writes its score into the same checkpoint


def evaluate_checkpoint(
    directory: str | Path | None, settings: EvaluationSettings | None = None, **changes: Any
) -> dict[str, Any]:
    """Score a checkpoint or another model. Write answers to the disk after each task, texts after each batch.

    After an interruption, the same call continues and gives the same result. If MMLU was evaluated completely before,
    no model is loaded. Without `server`, a score of the task group mmlu is written into the checkpoint's
    checkpoint_info.json, even a score with a limit.

    Args:
        directory: the checkpoint's folder; or the name, folder or hub id of another model. With `server`: the
            checkpoint or model that the server runs, or None. For None, give `tokenizer` and `results_dir`.
        settings: how to score; by default `EvaluationSettings()`.
        changes: fields of `EvaluationSettings`, which replace those in `settings`.

    Returns:
        The fields that `evaluate_model` returns, and:
        model: digests of weights, config and tokenizer.
        weights: one digest of all that `model` has.
        date, results_dir: the time, and the folder of this evaluation.
        kept: whether this is the result of an earlier run.
        entered: whether checkpoint_info.json has this score now.
        put_aside, differing: if the folder had results of another model, where they are now; and phrases that say how
            that model differs.

    Raises:
        SurgeryError: as in `load_checkpoint` and `evaluate_model`. Most problems are found before the model is loaded.
        OSError: if results cannot be written.
    """
    settings = replace(settings or EvaluationSettings(), **changes)
    server = None
    if settings.server is not None:
        from model_preparation.evaluation.server_lm import Server, ServerLM  # slow to import

        server = Server.find(settings.server, settings.model)
    if directory is None:
        if server is None or settings.tokenizer is None:
            raise SurgeryError("No checkpoint is given. Give one, or give server and tokenizer.")
        scored = served_model(server.about["model"], settings.tokenizer, sources=settings.sources)
    else:
        scored = find_model(directory, settings.tokenizer, sources=settings.sources)
    root = scored.results_root(settings.results_dir)
    dtype = torch_dtype(settings.dtype)
    loaded = tasks_for(scored, settings)
    make_folder(root)
    asked = {
        **settings_of(loaded, settings),
        "device": "parallelize" if settings.parallelize else torch.device(settings.device).type,
        "dtype": scored.dtype if dtype is None else str(dtype).removeprefix("torch."),
        **({} if server is None else {"device": "server", "dtype": "as served", "server": dict(server.about)}),
    }
    results = ResultsFolder(root, asked, scored.inputs)

    def load(advance: Callable[[int], None]) -> LM:
        if server is not None:
            return ServerLM(server, scored.tokenizer, settings.batch_size, settings.seed, advance)
        return _scoring(*scored.load(settings.device, dtype, settings.parallelize), settings, advance)

    with results.held():
        if server is not None:
            server.check_same(load_tokenizer(scored.tokenizer), results)
        result = results.result()
        # Only MMLU's questions have a digest. The questions of other tasks are made again, and compared.
        kept = result is not None and all(map(is_mmlu, loaded.names))
        if not kept:
            lm, tracker = ResumableLM(load, results), results.tracker()
            found = run_tasks(lm, loaded, asked, tracker, scored.name)
            samples = found.pop("samples")
            digests = {name: _digest(rows) for name, rows in samples.items()}
            kept = result is not None and not lm.asked and result["asked"] == digests
            if not kept:
                model = {"weights": results.weights, "model": results.model}
                result = {**_summary(found, loaded, lm), "settings": asked, **model, "date": creation_time()}
                results.finish(tracker, found, samples, {**result, "asked": digests})
    assert result is not None
    result = {name: value for name, value in result.items() if name not in ("asked", "files", "info_sha256")}
    result |= {"results_dir": str(results.folder), "kept": kept, "entered": False}
    if results.put_aside is not None:
        result |= {"put_aside": str(results.put_aside), "differing": results.differing}
    if scored.is_checkpoint and server is None:
        try:
            result["entered"] = _enter_score(scored.folder, result, is_mmlu=loaded.names == (MMLU,))
        except OSError as error:
            # A checkpoint in a read-only folder keeps its old checkpoint_info.json: its results are in --results_dir.
            if settings.results_dir is None or error.errno not in _READ_ONLY:
                raise
    return result


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Score a loaded model on lm-eval's tasks, on its device and in its dtype. Nothing is written to the disk.

    `settings` and `changes` are as in `evaluate_checkpoint`.

    Returns:
        tasks: {name: {"score", "stderr", "metric", "questions", "protocol"}} of the tasks and groups that were named.
            Accuracies are fractions. stderr is None for a single question.
        groups, subjects: the same for all groups, and for all single tasks. MMLU's names lack `mmlu_` here.
        score, stderr, metric: of the task or group; None if there are several.
        questions: the number of all questions.
        lm_eval_version, max_length: max_length counts the tokens of the model's longest sequence.
        mmlu_data: where MMLU's questions came from.
        truncated: {task: number of prompts that were cut}, if any were.
        settings: everything that the scores depend on except the weights, with digests of questions and task files.

    Raises:
        SurgeryError: for missing or malformed tasks or questions, for a setting that is out of range or has no effect
            on a loaded model, and for logits that are not finite.
    """
    settings = replace(settings or EvaluationSettings(), **changes)
    for name in _LOADING_SETTINGS:
        if getattr(settings, name) != getattr(EvaluationSettings(), name):
            raise SurgeryError(f"{name} has no effect on a model that is loaded. Leave it out.")
    loaded = load_asked(settings, lambda: tokenizer, getattr(model.config, "max_position_embeddings", None))
    asked = {
        **settings_of(loaded, settings),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    lm = ResumableLM(lambda advance: _scoring(model, tokenizer, settings, advance))
    return {**_summary(run_tasks(lm, loaded, asked), loaded, lm), "settings": asked}


def settings_of(loaded: Tasks, settings: EvaluationSettings) -> dict[str, Any]:
    """Everything that a score depends on, except the model, its device and its dtype."""
    num_fewshot = settings.num_fewshot
    if num_fewshot is None and loaded.suite is None and all(map(is_mmlu, loaded.names)):
        num_fewshot = 0  # MMLU's definitions set no number, and lm-eval then takes 0
    return {
        "tasks": [short_name(name) for name in loaded.names],
        "limit": settings.limit,
        "num_fewshot": num_fewshot,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        **({"questions": loaded.questions.digest} if loaded.questions else {}),
        **({"task_files": loaded.digests} if loaded.digests else {}),
        **({"suite": loaded.suite} if loaded.suite else {}),
        **({"recall": loaded.made} if loaded.made else {}),
        **({"allow_truncation": True} if settings.allow_truncation else {}),
        "lm_eval": lm_eval.__version__,
    }


def run_tasks(
    lm: LM, loaded: Tasks, asked: Mapping[str, Any], tracker: EvaluationTracker | None = None, name: str | None = None
) -> dict[str, Any]:
    """Run lm-eval's own evaluation, and return everything that it returns.

    Args:
        lm: the model.
        loaded: the tasks.
        asked: what `settings_of` returns, and `device`.
        tracker, name: the writer of lm-eval's files, and the model's name in these files.
    """
    seeds = {f"{name}_seed": asked["seed"] for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    # Otherwise lm-eval would record the git commit of the current folder, whatever is in it.
    with quiet(), patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None):
        return lm_eval.simple_evaluate(
            model=lm,
            model_args=None if name is None else {"pretrained": name},
            tasks=loaded.items,
            task_manager=loaded.manager,
            num_fewshot=asked["num_fewshot"],
            limit=asked["limit"],
            batch_size=asked["batch_size"],
            device=asked["device"],
            evaluation_tracker=tracker,
            **seeds,
        )


def tasks_for(scored: ScoredModel, settings: EvaluationSettings) -> Tasks:
    """Load the tasks that the settings name. Documents of recall tasks are made with this model's tokenizer.

    Raises:
        SurgeryError: as in `load_tasks` and `RecallRecipe`, and for settings that do not belong to the tasks.
    """
    return load_asked(settings, lambda: load_tokenizer(scored.tokenizer), scored.config.get("max_position_embeddings"))


def load_asked(
    settings: EvaluationSettings, load: Callable[[], PreTrainedTokenizerBase], max_positions: int | None
) -> Tasks:
    """The same as `tasks_for`. `load` returns the model's tokenizer; a sequence has at most `max_positions` tokens."""
    if isinstance(settings.tasks, Tasks):
        return settings.tasks
    names: Sequence[str] = settings.tasks
    protocols, embedded, recall = None, False, None
    task_data = dict(each.split("=", 1) for each in settings.task_data or ())
    if settings.suite is not None:
        if tuple(names) != EvaluationSettings().tasks or settings.num_fewshot is not None:
            raise SurgeryError("--suite sets the tasks and their solved examples. Leave out --tasks and --num_fewshot.")
        embedded = is_embedded(load())
        protocols = tasks_of_suite(settings.suite, embedded=embedded, with_data=task_data)
        names = tuple(protocols)
    for name in ("lengths", "language", "haystack"):
        tasks_with_it = [task for task in recall_names() if takes(task, name)]
        if getattr(settings, name) != getattr(EvaluationSettings(), name) and not {*names} & {*tasks_with_it}:
            raise SurgeryError(
                f"--{name} is {getattr(settings, name)}, and {' '.join(names)} does not take it. "
                f"Leave out --{name}, or choose one of {', '.join(tasks_with_it)}."
            )
    if any(map(is_recall, names)):
        tokenizer = load()
        recall = RecallRecipe(
            tokenizer,
            longest_document(tokenizer, max_positions),
            lengths=settings.lengths,
            language=settings.language,
            haystack=settings.haystack,
            documents=settings.limit or DOCUMENTS,
            seed=settings.seed,
        )
        if embedded:
            recall = replace(recall, lengths=recall.lengths_of(EMBEDDED_RECALL))
    shots = settings.num_fewshot if protocols is None or MMLU not in protocols else protocols[MMLU].shots
    loaded = load_tasks(
        names, mmlu_data=settings.mmlu_data, num_fewshot=shots, task_data=task_data, recall=recall, protocols=protocols
    )
    loaded.suite = settings.suite
    return loaded


def _scoring(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    advance: Callable[[int], None],
) -> ScoringLM:
    with quiet():
        return ScoringLM(model, tokenizer, settings.batch_size, advance, allow_truncation=settings.allow_truncation)


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """A BLAKE3 digest of a task's questions, prompts and right answers, made from lm-eval's digests of them."""
    names = ("doc_hash", "prompt_hash", "target_hash")
    return blake3("".join(sample[name] for sample in samples for name in names).encode()).hexdigest()


def _summary(found: Mapping[str, Any], loaded: Tasks, lm: ResumableLM) -> dict[str, Any]:
    """The part of lm-eval's results that `evaluate_model` returns."""
    protocols = {task.task_name: _protocol(task, found, loaded) for task in loaded.single}
    rows = {}
    for item in loaded.items:
        inside = [*item.get_all_groups(), *item.get_all_tasks()] if isinstance(item, Group) else []
        for each in (item, *inside):
            first = next(iter(each.get_all_tasks())) if isinstance(each, Group) else each
            rows[name_of(each)] = _row(found, name_of(each), loaded) | {"protocol": protocols[first.task_name]}
    items = {name_of(item): rows[name_of(item)] for item in loaded.items}
    groups = [group for item in loaded.items if isinstance(item, Group) for group in item.get_all_groups()]
    only = next(iter(items.values())) if len(items) == 1 else dict.fromkeys(("score", "stderr", "metric"))
    return {
        **only,
        "questions": sum(row["questions"] for row in items.values()),
        "tasks": items,
        "groups": {_short(group.name): rows[group.name] for group in groups},
        "subjects": {_short(name): rows[name] for name in protocols},
        "lm_eval_version": found["lm_eval_version"],
        "max_length": found["max_length"],
        **({"mmlu_data": loaded.questions.source} if loaded.questions else {}),
        **({"truncated": lm.truncated} if lm.truncated else {}),
    }


def _row(found: Mapping[str, Any], name: str, loaded: Tasks) -> dict[str, Any]:
    """Score, standard error, metric and number of questions of a task or group. A missing score is None."""
    row = found["results"][name]
    metric = chosen_metric(row, loaded.metrics.get(name, "acc"))
    stderr = None if metric is None else row.get(metric.replace(",", "_stderr,"), "N/A")
    return {
        "score": None if metric is None else float(row[metric]),
        "stderr": None if stderr in (None, "N/A") else float(stderr),
        "metric": metric,
        "questions": row.get("sample_count", {}).get(metric, row.get("sample_len") or 0),
    }


def _protocol(task: Task, found: Mapping[str, Any], loaded: Tasks) -> dict[str, Any]:
    """How a task was asked: `shots`, `output` (lm-eval's word), `metric`, `template`, and `length` of a recall task."""
    metadata = task.config.metadata or {}
    template = metadata.get("template", task.config.doc_to_text)
    if not isinstance(template, str):
        template = getattr(template, "__qualname__", f"{type(task).__qualname__}.doc_to_text")
    metric = _row(found, task.task_name, loaded)["metric"]
    length = {"length": metadata["length"]} if isinstance(task, RecallTask) else {}
    shots = found["n-shot"].get(task.task_name, 0)
    return {"shots": shots, "output": task.OUTPUT_TYPE, "metric": metric, **length, "template": template}


def _short(name: str) -> str:
    return name.removeprefix("mmlu_") if is_mmlu(name) else name


# --- The score in checkpoint_info.json --------------------------------------------------------------------------------


def _enter_score(directory: Path, result: Mapping[str, Any], *, is_mmlu: bool) -> bool:
    """Write an MMLU score, its model and its settings into checkpoint_info.json. Return whether the file has it now.

    If the file has a score of the same model over more questions, that score stays. Any other score is replaced, such
    as one of another model, or one that was given at the build. If `is_mmlu` is false, nothing is written, but a score
    of another model is removed.
    """
    measured = {name: result[name] for name in _SCORE_FIELDS}
    path = directory / INFO
    hold = _take_when_free(path)
    try:
        info = read_info(directory)
        before = info.get("mmlu_result")
        is_current = not differences((before or {}).get("model", {}), measured["model"])
        if is_mmlu and not (before and is_current and before["questions"] > measured["questions"]):
            if before != measured:
                write_file(path, with_checksum({**info, "mmlu_score": result["score"], "mmlu_result": measured}))
            return True
        if before and not is_current:
            without = {name: value for name, value in info.items() if name != "mmlu_result"}
            write_file(path, with_checksum({**without, "mmlu_score": None}))
        return False
    finally:
        hold.release()


def _take_when_free(path: Path) -> Hold:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return take(path)
        except SurgeryError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
