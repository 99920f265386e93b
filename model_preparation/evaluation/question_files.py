"""The MMLU questions as files: four layouts, one kind of row.

In: a folder, a subject and a split. Out: the rows, {"question": str, "choices": [4 str], "answer": 0 to 3}, the same
for the same questions in whichever layout; or the file, the line and what is wrong with it. Nothing is guessed or
repaired: text is taken as it stands, so a choice that reads None or NA is that text.
"""

import csv
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval

from model_preparation.errors import SurgeryError
from model_preparation.io.text import decode

STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
SUBJECTS = tuple(sorted(path.stem.removeprefix("mmlu_") for path in STOCK_TASKS.glob("mmlu_*.yaml")))
SPLITS = ("dev", "test")  # what the stock tasks read: the few-shot examples and the questions
FIELDS = ("question", "choices", "answer")
LETTERS = "ABCD"

_COMPLETE = "Give a complete copy with --mmlu_data."
_PART = re.compile(r"-(\d+)-of-(\d+)(-\w+)?$")  # datasets once added a digest
_SURROGATE = re.compile("[\ud800-\udfff]")  # halves of a character, which JSON can spell and UTF-8 cannot

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where a subject's split lies in the folder, and how to read one file of it.

    `read` yields, per question, where it is in the file, and its fields by name, unchecked.
    """

    pattern: str
    read: Callable[[Path], Iterator[tuple[str, Any]]]

    def files(self, folder: Path, subject: str, split: str) -> list[Path]:
        """The split's files there are, sorted."""
        found = folder.glob(self.pattern.format(subject=subject, split=split))
        return sorted(path for path in found if path.is_file())

    def __str__(self) -> str:
        return self.pattern.format(subject="<subject>", split="{dev,test}")


def find_layout(folder: Path, subject: str) -> Layout | None:
    """The layout in which `folder` holds a subject; None if it holds nothing of it.

    Raises:
        SurgeryError: if there are two.
    """
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
        SurgeryError: if there is no file or no row, parts of a split are missing or from different sets, a file cannot
            be read, a column is missing, or a row is malformed; the message names file and row.
    """
    layout = find_layout(folder, subject)
    files = layout.files(folder, subject, split) if layout else []
    if layout is None or not files:
        wanted = (layout or HUB_LAYOUT).pattern.format(subject=subject, split=split)
        raise SurgeryError(f"The MMLU folder {folder} has no {wanted}. {_COMPLETE}")
    _check_parts(files)
    rows = [_checked(file, place, seen) for file in files for place, seen in layout.read(file)]
    if not rows:
        raise SurgeryError(f"{files[0]} has no rows. {_COMPLETE}")
    return rows


def _check_parts(files: list[Path]) -> None:
    """Parts left by another download would repeat questions, and parts not copied would leave some out."""
    matches = [_PART.search(file.stem) for file in files]
    parts = [(int(match[1]), int(match[2])) if match else (0, 1) for match in matches]
    if parts != [(index, len(files)) for index in range(len(files))]:
        raise SurgeryError(
            f"{files[0].parent} has {', '.join(file.name for file in files)}, which are not the parts of one whole. "
            f"{_COMPLETE}"
        )


def _checked(file: Path, place: str, seen: Any) -> Row:
    """The row that the fields make."""
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
    if type(index) is not int or not 0 <= index < 4:  # True and 1.0 are not meant
        raise _malformed(file, place, f"the answer {reprlib.repr(answer)}", "0 to 3 or A to D there")
    return {"question": question, "choices": choices, "answer": index}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _malformed(file: Path, place: str, seen: str, needed: str) -> SurgeryError:
    return SurgeryError(f"{place} of {file} has {seen}, but needs {needed}. Correct the file, or copy it again.")


# --- Formats ----------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    content = _read_bytes(file)
    if content.startswith(b"version https://git-lfs"):
        raise SurgeryError(f"{file} is a pointer that git left in place of the file. Run git lfs pull there.")
    try:
        # Memory of pyarrow's own, and none of its threads: one that drops a Python object while Python ends aborts it.
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
    for index, row in enumerate(table.select(FIELDS).to_pylist()):
        yield f"Row {index}", row


def _read_csv(file: Path) -> Iterator[tuple[str, Row]]:
    """The original files: no header; question, choices A to D, the answer's letter."""
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
                needed = "A, B, C or D in the last column, in the first line too, as there is no header"
                raise _malformed(file, place, f"the answer {reprlib.repr(letter)}", needed)
            yield place, {"question": question, "choices": choices, "answer": letter}
    except csv.Error as error:
        raise SurgeryError(
            f"The question that ends in line {reader.line_num} of {file} is not CSV: {error}. "
            "Correct the file, or copy it again."
        ) from error


def _read_json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    # Other ends of lines that str.splitlines knows may stand within a string.
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
        raise ValueError(f"a field twice, of {', '.join(name for name, _ in pairs)}")
    return fields


def _read_text(file: Path) -> str:
    """The file's text, its line ends as they are: they may stand within quotes."""
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


HUB_LAYOUT = Layout("{subject}/{split}-*.parquet", _read_parquet)  # cais/mmlu's
LAYOUTS = (
    HUB_LAYOUT,
    Layout("{split}/{subject}_{split}.csv", _read_csv),  # the original, Hendrycks and others, 2021
    Layout("{subject}/{split}.jsonl", _read_json_lines),
    Layout("{split}/{subject}.jsonl", _read_json_lines),
)
