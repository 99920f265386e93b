"""Text to train on, from files or from a hub. Healing and distilling both read it here."""

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from model_preparation.errors import SurgeryError
from model_preparation.hub.download import NoSnapshot, fetch_snapshot
from model_preparation.io.text import open_text, read_text

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_DATA_SET = re.compile(r"(?:(modelscope|huggingface):)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?", re.ASCII)
_NAMES = "org/name or org/name:config, on ModelScope modelscope:org/name"

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A part of a text, and whether it is the text's first and its last part."""

    text: str
    is_first: bool
    is_last: bool


def files_of_text(data: str) -> list[Path] | None:
    """The files that hold the text; None for the name of a hub's data set. No hub is asked.

    Args:
        data: a file or folder as `text_files` takes it, or a name as `read_data_set` takes it.

    Raises:
        SurgeryError: if it can be neither.
    """
    if not data:
        raise SurgeryError("The name of the text is empty. Give a file, a folder, or the name of a data set.")
    path = Path(data).expanduser()
    if path.exists() or path.is_absolute() or data.startswith(".") or path.suffix in SUFFIXES:
        return text_files(path, SUFFIXES, "the name of a data set")
    _data_set_named(data)
    return None


def text_files(path: Path, suffixes: tuple[str, ...], otherwise: str) -> list[Path]:
    """The file, or all files in the folder and below it that end in one of `suffixes`; sorted by path.

    Args:
        otherwise: what the user may give instead of files, for messages.

    Raises:
        SurgeryError: if there is no such file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        if not files:
            raise SurgeryError(f"{path} holds no {', '.join(suffixes)} files. Give a folder with text in it.")
        return files
    if not path.is_file():
        raise SurgeryError(f"{path} is not there. Give a file or folder of text, or {otherwise}.")
    if path.suffix.lower() not in suffixes:
        raise SurgeryError(
            f"{path} ends in none of {', '.join(suffixes)}, so its format is unknown. "
            "Save plain text as .txt, and JSON as .jsonl with one object per line."
        )
    return [path]


def read_texts(files: Iterable[Path], piece_characters: int = -1) -> Iterator[Piece]:
    """Every text in the files: a .txt or .md file is one text, a row of a .jsonl or .parquet file is one.

    Args:
        files: as `text_files` gives them.
        piece_characters: cut longer texts into pieces of about this size; -1 keeps them whole.

    Raises:
        SurgeryError: for a file or row without text. It names both.
    """
    for path in files:
        try:
            for source in _texts_in(path, is_whole=piece_characters < 0):
                with source as text:
                    yield from _cut(text, piece_characters)
        except ValueError as error:  # it is not UTF-8, JSON, or what pyarrow can read
            raise SurgeryError(f"{path} cannot be read as text: {error}. Mend the file or leave it out.") from error


def read_data_set(name: str) -> Iterator[str]:
    """The field "text" of every row in the split "train" of a hub's data set, downloaded if need be.

    Args:
        name: NAME or NAME:CONFIG on Hugging Face; with "modelscope:" before it on ModelScope.

    Raises:
        SurgeryError: if there is no such data set, or a row has no text.
    """
    import datasets  # takes a second, and only names need it

    hub, repo, config = _data_set_named(name)
    try:
        place = _from_modelscope(repo) if hub == "modelscope" else repo
        rows: Iterable[Any] = datasets.load_dataset(place, config, split="train")
    except Exception as error:  # its own, the hub client's, and plain ones
        reason = " ".join(str(error).split())[:200]
        raise SurgeryError(
            f"{name} is neither a file nor a folder, and no data set could be loaded ({reason}). Give its name as "
            f"{_NAMES} (HF_ENDPOINT may name a mirror of Hugging Face), or the folder of a copy."
        ) from error
    try:
        for number, row in enumerate(rows):
            yield _text_of(row, f"row {number}")
    except ValueError as error:
        raise SurgeryError(f"{name}: {error}. Every row needs that field.") from error


def _data_set_named(name: str) -> tuple[str | None, str, str | None]:
    """(hub, repository, configuration) of a data set's name."""
    given = _DATA_SET.fullmatch(name)
    if given is None:
        raise SurgeryError(f"{name} is neither a file nor a folder, nor the name of a data set: {_NAMES}.")
    return given[1], given[2], given[3]


def _texts_in(path: Path, *, is_whole: bool) -> Iterator[AbstractContextManager[TextIO]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _rows_of_table(path)
    elif suffix == ".jsonl":
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield io.StringIO(_text_of(_parsed(line, f"line {number}"), f"line {number}"))
    else:
        yield io.StringIO(read_text(path)) if is_whole else open_text(path)


def _rows_of_table(path: Path) -> Iterator[TextIO]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        columns = table.schema_arrow.names
        if "text" not in columns:
            raise ValueError(f'it has no column "text", only {", ".join(columns)}')
        rows = (row for batch in table.iter_batches(columns=["text"]) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield io.StringIO(_text_of(row, f"row {number}"))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error.args[0].partition(':')[0]})") from error


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where} has no string "text"')
    return row["text"]


def _cut(text: TextIO, size: int) -> Iterator[Piece]:
    """Cut after the last line end of a piece; without one, before its last blank; without both, anywhere."""
    piece, is_first = text.read(size), True
    while following := text.read(size):
        cut = piece.rfind("\n") + 1 or max(0, piece.rfind(" ")) or len(piece)
        yield Piece(piece[:cut], is_first, False)
        piece, is_first = piece[cut:] + following, False
    yield Piece(piece, is_first, True)


def _from_modelscope(repo: str) -> str:
    """The folder of a data set's files, downloaded if need be."""
    wanted = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.txt", "*.gz", "*.zst", "README.md"]
    try:
        snapshot = fetch_snapshot("modelscope", repo, None, wanted, ignore_patterns=[], repo_type="dataset")
    except NoSnapshot as failure:
        raise SurgeryError(f"ModelScope {failure}") from failure
    if snapshot.trouble:
        logger.warning("ModelScope %s; using %s", snapshot.trouble, snapshot.folder)
    return str(snapshot.folder)
