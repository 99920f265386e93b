"""The MMLU score of a model, as lm-eval's task group `mmlu` gives it.

In: a checkpoint folder, or a model with its tokenizer, and the questions: a folder in the `cais/mmlu` parquet layout,
or the Hugging Face hub's copy. Out: a dict with the score, the four groups, the 57 subjects, and the settings they
belong to. Prompts, weighting and standard errors are lm-eval's own; ours is where the questions come from, and that
whatever goes wrong is an error and never a score.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow
import pyarrow.parquet
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.surgery.checkpoint_info import read_info
from model_preparation.surgery.checkpoint_loading import load_checkpoint

MMLU_REPO = "cais/mmlu"
STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
SUBJECTS = tuple(sorted(path.stem.removeprefix("mmlu_") for path in STOCK_TASKS.glob("mmlu_*.yaml")))
GROUPS = ("stem", "humanities", "social_sciences", "other")
SPLITS = ("dev", "test")  # what the stock tasks read: the few-shot examples and the questions
COLUMNS = ("question", "choices", "answer")
ANSWER_SECONDS = 10  # a hub that has said nothing by then is out of reach


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
    folder = find_questions(mmlu_data, num_fewshot=num_fewshot)
    model, tokenizer = load_checkpoint(directory, device=device, dtype=dtype)
    return evaluate_model(
        model, tokenizer, limit=limit, mmlu_data=folder, num_fewshot=num_fewshot, batch_size=batch_size, seed=seed
    )


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    mmlu_data: str | Path | None = None,
    num_fewshot: int = 0,
    batch_size: int = 4,
    seed: int = 1234,
) -> dict[str, Any]:
    """Score a model on lm-eval's task group `mmlu`, on the device and in the dtype it has.

    Args:
        limit: questions per subject, from the first on; None takes all.
        mmlu_data: as in `find_questions`.
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
    folder = find_questions(mmlu_data, num_fewshot=num_fewshot)
    with _warnings_of_lm_eval_off():
        manager, mmlu = _load_tasks(folder, num_fewshot)
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
            "mmlu_data": str(folder),
        },
    }


def find_questions(mmlu_data: str | Path | None = None, *, num_fewshot: int = 0) -> Path:
    """The folder with the questions, after reading every one of them that will be needed.

    Args:
        mmlu_data: a folder `<subject>/{dev,test}-*.parquet` with columns question (str), choices (4 str) and answer
            (0 to 3). None takes the environment variable MMLU_DATA, and without that the Hugging Face hub's cais/mmlu,
            which is kept in its cache and found there without a network.
        num_fewshot: examples needed per subject.

    Raises:
        SurgeryError: if the folder or the hub is out of reach, a subject or column is missing, a row is malformed, or a
            subject has too few examples.
    """
    given = mmlu_data or os.environ.get("MMLU_DATA")
    folder = Path(given).expanduser().resolve() if given else _download_questions()
    if not folder.is_dir():
        raise SurgeryError(
            f"The MMLU folder {folder} does not exist. Give one with <subject>/{{dev,test}}-*.parquet with --mmlu_data "
            "or in MMLU_DATA."
        )
    missing = [subject for subject in SUBJECTS if not (folder / subject).is_dir()]
    if missing:
        raise SurgeryError(
            f"The MMLU folder {folder} lacks {len(missing)} of {len(SUBJECTS)} subjects: {_some(missing)}. "
            f"Give a complete copy of {MMLU_REPO} with --mmlu_data."
        )
    for subject in SUBJECTS:
        examples, _questions = (len(_read_split(folder / subject, split)) for split in SPLITS)
        if examples < num_fewshot:
            raise SurgeryError(
                f"{subject} has {examples} examples in its dev split, but num_fewshot is {num_fewshot}. "
                f"Use --num_fewshot {examples} or less."
            )
    return folder


def read_subject(*, folder: str | Path, subject: str, **_task_metadata: Any) -> dict[str, datasets.Dataset]:
    """The splits of one subject, {"dev": rows, "test": rows}; the task files name this function as `custom_dataset`.

    Raises:
        SurgeryError: if a split has no file or row, a column is missing, or a row is malformed; the message names it.
    """
    return {split: datasets.Dataset.from_list(_read_split(Path(folder) / subject, split)) for split in SPLITS}


def _read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise SurgeryError(f"{folder} has no {split}-*.parquet. Give a complete copy of {MMLU_REPO} with --mmlu_data.")
    rows: list[dict[str, Any]] = []
    for file in files:
        rows += _read_file(file)
    if not rows:
        raise SurgeryError(f"{files[0]} has no rows. Give a complete copy of {MMLU_REPO} with --mmlu_data.")
    return rows


def _read_file(file: Path) -> list[dict[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise SurgeryError(f"{file} is not a readable parquet file: {error}. Copy it again.") from error
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise SurgeryError(
            f"{file} has the columns {', '.join(table.column_names)}, but not {', '.join(missing)}. "
            f"Give files in the layout of {MMLU_REPO} with --mmlu_data."
        )
    rows = table.select(COLUMNS).to_pylist()
    for index, row in enumerate(rows):
        choices = row["choices"]
        four_texts = isinstance(choices, list) and len(choices) == 4 and all(isinstance(text, str) for text in choices)
        if not (isinstance(row["question"], str) and four_texts and row["answer"] in range(4)):
            raise SurgeryError(
                f"Row {index} of {file} is {row}, but a question needs a text, four choices and an answer from 0 to 3. "
                "Correct the file."
            )
    return rows


def _download_questions() -> Path:
    """The hub's snapshot. `datasets.load_dataset` would retry for 23 s before it says that there is no network."""
    patterns = [f"{subject}/{split}-*.parquet" for subject in SUBJECTS for split in SPLITS]
    download = partial(snapshot_download, MMLU_REPO, repo_type="dataset", allow_patterns=patterns)
    try:
        HfApi().dataset_info(MMLU_REPO, timeout=ANSWER_SECONDS)  # the download's own first question has no time limit
        return Path(download())
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        try:
            return Path(download(local_files_only=True))
        except LocalEntryNotFoundError:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise SurgeryError(
                f"The MMLU questions cannot be fetched from {constants.ENDPOINT}/datasets/{MMLU_REPO} "
                f"({reason}), nor are they in {constants.HF_HUB_CACHE}. Give a folder with "
                "<subject>/{dev,test}-*.parquet with --mmlu_data or in MMLU_DATA, or a mirror in HF_ENDPOINT."
            ) from error


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


def _some(names: list[str], at_most: int = 5) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
