"""The MMLU questions: where they come from, every one of them checked, and one digest for all.

In: a folder in one of the layouts of `question_files`, or a hub's name. Out: `Questions`, and per subject the data sets
that lm-eval's task files ask for.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.question_files import (
    HUB_LAYOUT,
    LAYOUTS,
    SPLITS,
    SUBJECTS,
    Row,
    find_layout,
    read_split,
)
from model_preparation.hub.download import TITLES, NoSnapshot, fetch_snapshot

if TYPE_CHECKING:
    import datasets

MMLU_REPO = "cais/mmlu"  # under this id at both hubs, and with the same paths
HUBS = {"hub": "huggingface", "modelscope": "modelscope"}  # what --mmlu_data calls them
ENVIRONMENT = "MMLU_DATA"
# They begin with a wildcard, so that ModelScope is asked for one listing, not one per subject. `all` has them again.
_WANTED, _UNWANTED = [f"*/{split}-*.parquet" for split in SPLITS], ["all/*"]

logger = logging.getLogger(__name__)

_LAYOUTS_IN_WORDS = ", ".join(map(str, LAYOUTS))
_HOW_TO_GIVE = f"--mmlu_data (or the environment variable {ENVIRONMENT})"


@dataclass(frozen=True)
class Questions:
    """Questions and examples that were all read and found in order.

    Attributes:
        source: for people and for the record: "hub:cais/mmlu@<commit>", "modelscope:cais/mmlu@<branch>" (its client
            tells no commit), or the folder that was given.
        folder: where the files are.
        digest: SHA-256, 64 hex digits, of what `digest_of` says: the same for the same questions in any layout.
    """

    source: str
    folder: Path
    digest: str


def find_questions(mmlu_data: str | Path | None = None, *, num_fewshot: int = 0) -> Questions:
    """The folder with the questions, after reading every one of them.

    Args:
        mmlu_data: a folder, all 57 subjects in it, each in one of these layouts:
            - `<subject>/{dev,test}-*.parquet`, as cais/mmlu at the hubs: columns question, choices (4 str), answer;
            - `{dev,test}/<subject>_{dev,test}.csv`, the original: no header; question, A, B, C, D, the answer's letter;
            - `<subject>/{dev,test}.jsonl` or `{dev,test}/<subject>.jsonl`: an object with question, choices and answer
              per line, UTF-8.
            Answers are 0 to 3 or A to D; further columns and fields are not looked at. Or one of the words `hub`
            (Hugging Face's cais/mmlu) and `modelscope` (its copy), which are kept in the hubs' caches and found there
            without a network. None takes the environment variable MMLU_DATA, and without that the hub.
        num_fewshot: examples needed per subject.

    Raises:
        SurgeryError: if the folder or the hub is out of reach, a subject, file or column is missing, a row is
            malformed, or a subject has too few examples.
    """
    given = mmlu_data or os.environ.get(ENVIRONMENT) or "hub"
    source, folder = _from_hub(given) if given in HUBS else _from_folder(given)
    rows = {subject: {split: read_split(folder, subject, split) for split in SPLITS} for subject in SUBJECTS}
    for subject in SUBJECTS:
        examples = len(rows[subject]["dev"])
        if examples < num_fewshot:
            raise SurgeryError(
                f"{subject} has {examples} examples in its dev split, but num_fewshot is {num_fewshot}. "
                f"Use --num_fewshot {examples} or less."
            )
    return Questions(source, folder, digest_of(rows))


def read_subject(*, folder: str | Path, subject: str, **_task_metadata: Any) -> "dict[str, datasets.Dataset]":
    """The splits of one subject, {"dev": rows, "test": rows}; the task files name this function as `custom_dataset`.

    Rows are {"question": str, "subject": str, "choices": [4 str], "answer": 0 to 3}: the hub's columns in its order, so
    that lm-eval's digests of a question are those that anyone else's run of it has.

    Raises:
        SurgeryError: as `question_files.read_split`.
    """
    import datasets

    splits = {}
    for split in SPLITS:
        rows = read_split(Path(folder), subject, split)
        complete = [{"question": row["question"], "subject": subject, **row} for row in rows]
        splits[split] = datasets.Dataset.from_list(complete)
    return splits


def digest_of(rows: Mapping[str, Mapping[str, list[Row]]]) -> str:
    """SHA-256 of all rows, {subject: {split: rows}}: one line of ASCII JSON each, subjects in order, dev before test.

    A line is `[subject,split,index,question,[4 choices],answer]` without spaces, as Python's json.dumps spells it, and
    ends in a newline; index and answer count from 0.
    """
    digest = hashlib.sha256()
    for subject in sorted(rows):
        for split in SPLITS:
            for index, row in enumerate(rows[subject][split]):
                fields = [subject, split, index, row["question"], row["choices"], row["answer"]]
                digest.update(json.dumps(fields, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _from_folder(given: str | Path) -> tuple[str, Path]:
    folder = Path(os.path.expanduser(given)).resolve()
    if not folder.is_dir():
        raise SurgeryError(
            f"The MMLU folder {folder} {'is a file' if folder.exists() else 'does not exist'}. Give {_HOW_TO_GIVE} a "
            f"folder with {_LAYOUTS_IN_WORDS}, or one of the words {' and '.join(HUBS)}."
        )
    missing = [subject for subject in SUBJECTS if not find_layout(folder, subject)]
    if len(missing) == len(SUBJECTS):
        inner = [path.name for path in folder.iterdir() if path.is_dir() and find_layout(path, SUBJECTS[0])]
        raise SurgeryError(
            f"The MMLU folder {folder} holds no subject as {_LAYOUTS_IN_WORDS}. "
            + (f"Its folder {inner[0]} does: give that one." if inner else f"Give {_HOW_TO_GIVE} another folder.")
        )
    if missing:
        raise SurgeryError(
            f"The MMLU folder {folder} lacks {len(missing)} of {len(SUBJECTS)} subjects: {_some(missing)}. "
            f"Give a complete copy of {MMLU_REPO} with --mmlu_data."
        )
    return str(folder), folder


def _from_hub(word: str | Path) -> tuple[str, Path]:
    hub = HUBS[str(word)]
    others = " or ".join(repr(other) for other in HUBS if other != word)
    instead = f"Give {_HOW_TO_GIVE} {others} to ask there, or a folder with {_LAYOUTS_IN_WORDS}."
    try:
        snapshot = fetch_snapshot(hub, MMLU_REPO, None, _WANTED, ignore_patterns=_UNWANTED, repo_type="dataset")
    except NoSnapshot as failure:
        raise SurgeryError(f"The MMLU questions cannot be fetched: {TITLES[hub]} {failure}. {instead}") from failure
    missing = [
        HUB_LAYOUT.pattern.format(subject=subject, split=split)
        for subject in SUBJECTS
        for split in SPLITS
        if not HUB_LAYOUT.files(snapshot.folder, subject, split)
    ]
    if missing and snapshot.trouble:
        raise SurgeryError(
            f"The MMLU questions are not complete: {TITLES[hub]} {snapshot.trouble}, and the copy in {snapshot.folder} "
            f"lacks {_some(missing)}. Run this again once the hub answers, which completes the copy. {instead}"
        )
    if missing:
        raise SurgeryError(
            f"The MMLU questions are not complete: {TITLES[hub]}'s {MMLU_REPO}, now in {snapshot.folder}, lacks "
            f"{_some(missing)}. {instead}"
        )
    if snapshot.trouble:
        logger.warning("%s %s; using %s", TITLES[hub], snapshot.trouble, snapshot.folder)
    revision = f"@{snapshot.revision}" if snapshot.revision else ""
    return f"{word}:{MMLU_REPO}{revision}", snapshot.folder


def _some(names: list[str], at_most: int = 5) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
