"""Find MMLU's questions, read and check their files, and compute one digest of all questions.

A folder may have the questions in any of four layouts. The same questions give the same rows in every layout:
{"question": str, "choices": [4 str], "answer": 0 to 3}. Nothing is guessed or repaired: the choices None and NA are
texts like any other. The error for a malformed row names the file and the row or line.
"""

import csv
import hashlib
import io
import json
import logging
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval

from model_preparation.errors import SurgeryError
from model_preparation.hub.download import TITLES, NoSnapshot, fetch_snapshot
from model_preparation.io.text import decode

if TYPE_CHECKING:
    import datasets

STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
SUBJECTS = tuple(sorted(path.stem.removeprefix("mmlu_") for path in STOCK_TASKS.glob("mmlu_*.yaml")))
SPLITS = ("dev", "test")  # lm-eval's tasks take the solved examples from dev, and the questions from test
FIELDS = ("question", "choices", "answer")
LETTERS = "ABCD"

_REPO = "cais/mmlu"  # both hubs have this id, with the same paths inside
_HUBS = {"hub": "huggingface", "modelscope": "modelscope"}  # {word for --mmlu_data: hub}
_ENVIRONMENT = "MMLU_DATA"
_HOW_TO_GIVE = f"--mmlu_data (or the environment variable {_ENVIRONMENT})"
# A pattern that begins with a wildcard needs one listing from ModelScope, not one per subject. `all` repeats questions.
_WANTED, _UNWANTED = [f"*/{split}-*.parquet" for split in SPLITS], ["all/*"]

_COMPLETE = "Give a complete copy with --mmlu_data."
_PART = re.compile(r"-(\d+)-of-(\d+)(-\w+)?$")  # older versions of the library `datasets` added a digest
_SURROGATE = re.compile("[\ud800-\udfff]")  # halves of a character, which JSON can spell and UTF-8 cannot

Row = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """MMLU's questions and examples, after all of them were read and checked.

    Attributes:
        source: as results record it: "hub:cais/mmlu@<commit>", "modelscope:cais/mmlu@<branch>" (ModelScope's client
            gives no commit), or the folder that was given.
        folder: where the files are.
        digest: SHA-256, 64 hex digits, as `digest_of` computes it.
    """

    source: str
    folder: Path
    digest: str


def find_questions(mmlu_data: str | Path | None = None, *, num_fewshot: int = 0) -> Questions:
    """Find the folder with the questions, and read and check every question.

    Args:
        mmlu_data: a folder with all 57 subjects, each in one of these layouts:
            - `<subject>/{dev,test}-*.parquet`, as cais/mmlu at the hubs: columns question, choices (4 str), answer;
            - `{dev,test}/<subject>_{dev,test}.csv`, the original: no header; question, A, B, C, D, the answer's letter;
            - `<subject>/{dev,test}.jsonl` or `{dev,test}/<subject>.jsonl`: an object with question, choices and answer
              per line, UTF-8.
            Answers are 0 to 3 or A to D, in csv files only A to D. Other columns of parquet files and other
            fields of jsonl files are ignored. Instead of a folder: the word `hub` (cais/mmlu at Hugging Face)
            or `modelscope` (the copy at ModelScope). Downloads stay in the hubs' caches, where they are found
            without a network. None: the environment variable MMLU_DATA if it is set, else `hub`.
        num_fewshot: the number of solved examples that each subject must have.

    Raises:
        SurgeryError: if the folder or hub cannot be reached, if a subject, file or column is missing, if a row is
            malformed, or if a subject has too few examples.
    """
    given = mmlu_data or os.environ.get(_ENVIRONMENT) or "hub"
    source, folder = _from_hub(given) if given in _HUBS else _from_folder(given)
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
    """The splits of one subject, {"dev": rows, "test": rows}. Our task files name this function as `custom_dataset`.

    Rows are {"question": str, "subject": str, "choices": [4 str], "answer": 0 to 3}. These are the columns of the hub's
    files, in the same order. So lm-eval computes the same digest of a question as in other people's runs.

    Raises:
        SurgeryError: as in `read_split`.
    """
    import datasets

    splits = {}
    for split in SPLITS:
        rows = read_split(Path(folder), subject, split)
        complete = [{"question": row["question"], "subject": subject, **row} for row in rows]
        splits[split] = datasets.Dataset.from_list(complete)
    return splits


def digest_of(rows: Mapping[str, Mapping[str, list[Row]]]) -> str:
    """SHA-256 of all rows, {subject: {split: rows}}: one line of ASCII JSON per row, subjects sorted, dev before test.

    A line is `[subject,split,index,question,[4 choices],answer]` as Python's json.dumps writes it, without spaces
    between the items, and ends in a newline. Index and answer count from 0.
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
    layouts = ", ".join(map(str, LAYOUTS))
    if not folder.is_dir():
        raise SurgeryError(
            f"The MMLU folder {folder} {'is a file' if folder.exists() else 'does not exist'}. Give {_HOW_TO_GIVE} a "
            f"folder with {layouts}, or one of the words {' and '.join(_HUBS)}."
        )
    missing = [subject for subject in SUBJECTS if not _find_layout(folder, subject)]
    if len(missing) == len(SUBJECTS):
        inner = [path.name for path in folder.iterdir() if path.is_dir() and _find_layout(path, SUBJECTS[0])]
        raise SurgeryError(
            f"The MMLU folder {folder} has no subject in any of these layouts: {layouts}. "
            + (f"Its folder {inner[0]} has them: give that one." if inner else f"Give {_HOW_TO_GIVE} another folder.")
        )
    if missing:
        raise SurgeryError(
            f"The MMLU folder {folder} lacks {len(missing)} of {len(SUBJECTS)} subjects: {some(missing)}. "
            f"Give a complete copy of {_REPO} with --mmlu_data."
        )
    return str(folder), folder


def _from_hub(word: str | Path) -> tuple[str, Path]:
    hub = _HUBS[str(word)]
    others = " or ".join(repr(other) for other in _HUBS if other != word)
    instead = f"Give {_HOW_TO_GIVE} {others} to ask there, or a folder with {', '.join(map(str, LAYOUTS))}."
    try:
        snapshot = fetch_snapshot(hub, _REPO, None, _WANTED, ignore_patterns=_UNWANTED, repo_type="dataset")
    except NoSnapshot as failure:
        raise SurgeryError(f"The MMLU questions cannot be fetched: {TITLES[hub]} {failure}. {instead}") from failure
    missing = [
        _HUB_LAYOUT.pattern.format(subject=subject, split=split)
        for subject in SUBJECTS
        for split in SPLITS
        if not _HUB_LAYOUT.files(snapshot.folder, subject, split)
    ]
    if missing and snapshot.trouble:
        raise SurgeryError(
            f"The MMLU questions are not complete: {TITLES[hub]} {snapshot.trouble}, and the copy in {snapshot.folder} "
            f"lacks {some(missing)}. Run this again when the hub answers; then the copy is completed. {instead}"
        )
    if missing:
        raise SurgeryError(
            f"The MMLU questions are not complete: {TITLES[hub]}'s {_REPO}, now in {snapshot.folder}, lacks "
            f"{some(missing)}. {instead}"
        )
    if snapshot.trouble:
        logger.warning("%s %s; using %s", TITLES[hub], snapshot.trouble, snapshot.folder)
    revision = f"@{snapshot.revision}" if snapshot.revision else ""
    return f"{word}:{_REPO}{revision}", snapshot.folder


def some(names: list[str], at_most: int = 5) -> str:
    """A list of names as text: the first `at_most` names, then how many more there are."""
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


# --- Layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the files of a subject's split are, and how to read one file.

    `read` yields (place in the file, {field: value}) for each question. The fields are not checked yet.
    """

    pattern: str
    read: Callable[[Path], Iterator[tuple[str, Any]]]

    def files(self, folder: Path, subject: str, split: str) -> list[Path]:
        """The split's files, sorted; there may be none."""
        found = folder.glob(self.pattern.format(subject=subject, split=split))
        return sorted(path for path in found if path.is_file())

    def __str__(self) -> str:
        return self.pattern.format(subject="<subject>", split="{dev,test}")


def _find_layout(folder: Path, subject: str) -> Layout | None:
    """The layout of a subject in `folder`; None if the folder has no file of the subject."""
    found = [layout for layout in LAYOUTS if any(layout.files(folder, subject, split) for split in SPLITS)]
    if len(found) > 1:
        raise SurgeryError(
            f"The MMLU folder {folder} has {subject} in {len(found)} layouts, {' and '.join(map(str, found))}. "
            "Move all but one elsewhere."
        )
    return found[0] if found else None


def read_split(folder: Path, subject: str, split: str) -> list[Row]:
    """The rows of one split, in order.

    Raises:
        SurgeryError: if there is no file or no row, if the files of a split do not belong together, if a file cannot be
            read, if a column is missing, or if a row is malformed. The message for a malformed row names the
            file and the row or line.
    """
    layout = _find_layout(folder, subject)
    files = layout.files(folder, subject, split) if layout else []
    if layout is None or not files:
        wanted = (layout or _HUB_LAYOUT).pattern.format(subject=subject, split=split)
        raise SurgeryError(f"The MMLU folder {folder} has no {wanted}. {_COMPLETE}")
    matches = [_PART.search(file.stem) for file in files]
    parts = [(int(match[1]), int(match[2])) if match else (0, 1) for match in matches]
    # A part from another download would repeat questions. If a part is missing, so are its questions.
    if parts != [(index, len(files)) for index in range(len(files))]:
        raise SurgeryError(
            f"{files[0].parent} has {', '.join(file.name for file in files)}: a part is missing, or one is too many. "
            f"{_COMPLETE}"
        )
    rows = [_checked(file, place, seen) for file in files for place, seen in layout.read(file)]
    if not rows:
        raise SurgeryError(f"{files[0]} has no rows. {_COMPLETE}")
    return rows


def _checked(file: Path, place: str, seen: Any) -> Row:
    """Check the fields of a row, and return it."""
    missing = [field for field in FIELDS if field not in seen]
    if missing:
        raise _malformed(file, place, f"the fields {', '.join(seen) or '(none)'}", f"{', '.join(missing)} too")
    question, choices, answer = (seen[field] for field in FIELDS)
    if not _is_text(question):
        raise _malformed(file, place, f"the question {reprlib.repr(question)}", "a text there")
    if not (isinstance(choices, list) and len(choices) == 4 and all(map(_is_text, choices))):
        raise _malformed(file, place, f"the choices {reprlib.repr(choices)}", "four texts there")
    letter = answer.strip() if isinstance(answer, str) else None
    index = LETTERS.find(letter) if letter and len(letter) == 1 else answer
    if type(index) is not int or not 0 <= index < 4:  # also refuses True and 1.0
        raise _malformed(file, place, f"the answer {reprlib.repr(answer)}", "0 to 3 or A to D there")
    return {"question": question, "choices": choices, "answer": index}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _malformed(file: Path, place: str, seen: str, needed: str) -> SurgeryError:
    return SurgeryError(f"{place} of {file} has {seen}, but needs {needed}. Correct the file, or copy it again.")


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    content = _read_bytes(file)
    if content.startswith(b"version https://git-lfs"):
        raise SurgeryError(f"{file} is a pointer that git left in place of the file. Run git lfs pull there.")
    try:
        # pyarrow gets a copy of the bytes, and no threads: a thread that frees a Python object at exit aborts Python.
        owned = pyarrow.BufferOutputStream()
        owned.write(content)
        table = pyarrow.parquet.ParquetFile(owned.getvalue(), pre_buffer=False).read(use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise SurgeryError(f"{file} is not a readable parquet file: {error}. Copy it again.") from error
    unclear = [field for field in FIELDS if table.column_names.count(field) != 1]
    if unclear:
        raise SurgeryError(
            f"{file} has the columns {', '.join(table.column_names)}, but needs {', '.join(unclear)} once each. "
            "Give files in the layout of cais/mmlu with --mmlu_data."
        )
    for number, row in enumerate(table.select(FIELDS).to_pylist(), 1):
        yield f"Row {number}", row


def _read_csv(file: Path) -> Iterator[tuple[str, Row]]:
    """Read one of the original files. It has no header; columns are question, choices A to D, the answer's letter."""
    lines = io.StringIO(_read_text(file), newline="").readlines()  # quoted fields keep their line ends
    reader = csv.reader(lines)
    start = 0
    try:
        for fields in reader:
            place, start, record = f"Line {start + 1}", reader.line_num, lines[start : reader.line_num]
            if not fields:  # an empty line
                continue
            if len(record) > 1:  # a quote that is never closed would swallow questions
                next(csv.reader(record, strict=True))
            if len(fields) != 6:
                seen = f"{len(fields)} columns, {reprlib.repr(fields)}"
                raise _malformed(file, place, seen, "six: question, A, B, C, D and the answer's letter")
            question, *choices, letter = fields
            if letter.strip() not in tuple(LETTERS):
                needed = "A, B, C or D in the last column; the first line is a question too, not a header"
                raise _malformed(file, place, f"the answer {reprlib.repr(letter)}", needed)
            yield place, {"question": question, "choices": choices, "answer": letter}
    except csv.Error as error:
        raise SurgeryError(
            f"The question that ends in line {reader.line_num} of {file} is not CSV: {error}. "
            "Correct the file, or copy it again."
        ) from error


def _read_json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    # splitlines() would also split at characters that JSON strings may have.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            seen = json.loads(line, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise SurgeryError(
                f"Line {number} of {file} is not JSON: {why}. Correct the file; it needs one question per line."
            ) from error
        if not isinstance(seen, dict):
            raise _malformed(file, f"Line {number}", reprlib.repr(seen), "an object with the fields of a question")
        yield f"Line {number}", seen


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"a field occurs twice: {', '.join(name for name, _ in pairs)}")
    return fields


def _read_text(file: Path) -> str:
    """The file's text with its line ends unchanged: quoted fields may hold them."""
    content = _read_bytes(file)
    try:
        return decode(content)
    except ValueError as error:
        raise SurgeryError(f"{file} cannot be read: {error}.") from error


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SurgeryError(f"{file} cannot be read: {error.strerror}. Copy it again.") from error


_HUB_LAYOUT = Layout("{subject}/{split}-*.parquet", _read_parquet)  # cais/mmlu's
LAYOUTS = (
    _HUB_LAYOUT,
    Layout("{split}/{subject}_{split}.csv", _read_csv),  # the original, Hendrycks and others, 2021
    Layout("{subject}/{split}.jsonl", _read_json_lines),
    Layout("{split}/{subject}.jsonl", _read_json_lines),
)
