"""The MMLU score of a model, as lm-eval's task group `mmlu` gives it.

In: a checkpoint folder, or a model with its tokenizer, and the questions, as `questions` finds them. Out: a dict with
the score, the four groups, the 57 subjects, and the settings they belong to. Prompts, weighting and standard errors
are lm-eval's own; ours is where the questions come from, and that whatever goes wrong is an error and never a score.
"""

import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.question_files import STOCK_TASKS, SUBJECTS
from model_preparation.evaluation.questions import Questions, find_questions, read_subject
from model_preparation.surgery.checkpoint_info import read_info
from model_preparation.surgery.checkpoint_loading import load_checkpoint

GROUPS = ("stem", "humanities", "social_sciences", "other")


def evaluate_checkpoint(
    directory: str | Path,
    *,
    limit: int | None = None,
    mmlu_data: str | Path | None = None,
    num_fewshot: int = 0,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """Load a checkpoint and score it on MMLU.

    Args:
        directory: the checkpoint folder.
        device, dtype: as in `load_checkpoint`.
        limit, mmlu_data, num_fewshot, batch_size, seed: as in `evaluate_model`.

    Returns:
        As `evaluate_model`.

    Raises:
        SurgeryError: as `load_checkpoint` and `evaluate_model`; what can be checked is, before the model is loaded.
    """
    read_info(directory)
    questions = find_questions(mmlu_data, num_fewshot=num_fewshot)
    model, tokenizer = load_checkpoint(directory, device=device, dtype=dtype)
    return evaluate_model(
        model, tokenizer, limit=limit, mmlu_data=questions, num_fewshot=num_fewshot, batch_size=batch_size, seed=seed
    )


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    mmlu_data: str | Path | Questions | None = None,
    num_fewshot: int = 0,
    batch_size: int = 4,
    seed: int = 1234,
) -> dict[str, Any]:
    """Score a model on lm-eval's task group `mmlu`, on the device and in the dtype it has.

    Args:
        limit: questions per subject, from the first on; None takes all.
        mmlu_data: as in `find_questions`, or what it returned for as many examples.
        num_fewshot: solved examples before each question, from the `dev` split.
        batch_size: questions per forward pass.
        seed: of Python, NumPy, torch and the few-shot sampler (the stock sampler takes the first examples, unshuffled).

    Returns:
        `score` and `stderr` (fractions; stderr is None where a subject has a single question), `questions`, `groups`
        and `subjects` ({name: {"score", "stderr", "questions"}}), `lm_eval_version`, `settings`.

    Raises:
        SurgeryError: for questions missing or malformed, a setting out of range, or logits that are not finite.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise SurgeryError(f"{name} is {value}, but must be at least {least}. Give another number.")
    questions = mmlu_data if isinstance(mmlu_data, Questions) else find_questions(mmlu_data, num_fewshot=num_fewshot)
    with _warnings_of_lm_eval_off():
        manager, mmlu = _load_tasks(questions.folder, num_fewshot)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[mmlu],
        task_manager=manager,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    _check_answers(results["samples"])
    return {
        **_accuracy(results, "mmlu"),
        "groups": {name: _accuracy(results, f"mmlu_{name}") for name in GROUPS},
        "subjects": {name: _accuracy(results, f"mmlu_{name}") for name in SUBJECTS},
        "lm_eval_version": results["lm_eval_version"],
        "settings": {
            "task": "mmlu",
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "seed": seed,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": lm.max_length,
            "mmlu_data": questions.source,
        },
    }


def _load_tasks(folder: Path, num_fewshot: int) -> tuple[TaskManager, Any]:
    """lm-eval's own task files, each included by one of ours that says where the questions are."""
    reader = f"{read_subject.__module__}.{read_subject.__name__}"
    with tempfile.TemporaryDirectory() as scratch:
        for stock in STOCK_TASKS.glob("*.yaml"):
            lines = [f"include: {json.dumps(str(stock))}"]
            if not stock.name.startswith("_"):  # a subject; the others are groups
                source = {"folder": str(folder), "subject": stock.stem.removeprefix("mmlu_")}
                lines += [f"custom_dataset: !function {reader}", f"dataset_kwargs: {json.dumps(source)}"]
                lines += [f"num_fewshot: {num_fewshot}"]
            (Path(scratch) / stock.name).write_text("\n".join(lines), encoding="utf-8")
        # include_defaults would read all of lm-eval's thousands of task files first, 20 s.
        manager = TaskManager(include_defaults=False, include_path=scratch)
        return manager, manager.load("mmlu")["groups"]["mmlu"]


@contextmanager
def _warnings_of_lm_eval_off() -> Iterator[None]:
    """Setting up warns 59 times about what is meant here: a model already loaded, data of our own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_answers(samples: dict[str, list[dict[str, Any]]]) -> None:
    """NaN compares as an answer like any other, so a broken model would get the score of guessing."""
    for task, answers in samples.items():
        for answer in answers:
            if not all(math.isfinite(loglikelihood) for loglikelihood, _ in answer["filtered_resps"]):
                raise SurgeryError(
                    f"The model's logits for question {answer['doc_id']} of {task} are not finite, so it has no score. "
                    "Try --dtype float32; if that fails too, build the checkpoint again."
                )


def _accuracy(results: dict[str, Any], name: str) -> dict[str, Any]:
    row = results["results"][name]
    stderr = row["acc_stderr,none"]
    return {
        "score": float(row["acc,none"]),
        "stderr": None if stderr == "N/A" else float(stderr),
        "questions": row["sample_len"],
    }
