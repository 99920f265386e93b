"""Reads text to train on, from files or from a hub, for healing and distilling."""

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from model_preparation.errors import SurgeryError, one_line
from model_preparation.hub.download import NoSnapshot, fetch_snapshot
from model_preparation.io.text import open_text, read_text
from model_preparation.train.conversations import FORMS, UNSUPPORTED, Conversation, conversation_of

_TABLES = (".jsonl", ".parquet")
SUFFIXES = (".txt", ".md", *_TABLES)
_COLUMNS = {name for needed, optional in FORMS.items() for name in (*needed, *optional, *UNSUPPORTED)}
_FIELDS = ", or ".join(" and ".join(needed) for needed in FORMS)
_DATA_SET = re.compile(r"(?:(modelscope|huggingface):)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?", re.ASCII)
_NAMES = "org/name or org/name:config, or for ModelScope modelscope:org/name"

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A part of a text, whether the text begins with this part, and whether the text ends with it."""

    text: str
    is_first: bool
    is_last: bool


def files_of_text(data: str) -> list[Path] | None:
    """The files that `data` names, or None if `data` is the name of a hub's data set. This contacts no hub.

    Args:
        data: a file or folder (see `text_files`), or the name of a data set (see `_rows_of_data_set`).

    Raises:
        SurgeryError: if `data` is none of these.
    """
    if not data:
        raise SurgeryError("The name of the text is empty. Give a file, a folder, or the name of a data set.")
    path = Path(data).expanduser()
    if path.exists() or path.is_absolute() or data.startswith(".") or path.suffix in SUFFIXES:
        return text_files(path, SUFFIXES, "the name of a data set")
    _data_set_named(data)
    return None


def text_files(path: Path, suffixes: tuple[str, ...], otherwise: str) -> list[Path]:
    """The file `path`, or the files in and below the folder `path` that end in one of `suffixes`, sorted by path.

    Args:
        otherwise: what the user may give instead of files, for the error message.

    Raises:
        SurgeryError: if there is no file with such a suffix.
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


def read_texts(files: Iterable[Path], piece_characters: int) -> Iterator[Piece]:
    """Yield every text of the files, in pieces. A .txt or .md file is one text, and so is each row of another file.

    Args:
        files: from `text_files`.
        piece_characters: longer texts are cut into pieces of about this size.

    Raises:
        SurgeryError: for a file that cannot be read, or a row that has no text field. The message names file and row.
    """
    for path in files:
        try:
            if path.suffix.lower() in _TABLES:
                for where, row in _rows(path):
                    yield from _cut(io.StringIO(_text_of(row, where)), piece_characters)
            else:
                with open_text(path) as text:
                    yield from _cut(text, piece_characters)
        except ValueError as error:  # from reading the file, or from the checks of a row
            raise _unreadable(path, error) from error


def read_documents(data: str) -> Iterator[str | Conversation]:
    """Yield every text or conversation in files or in a hub's data set. All must be texts, or all conversations.

    A .txt or .md file is one text. A row of another file, or of a data set, is a text or a conversation.

    Args:
        data: as for `files_of_text`.

    Raises:
        SurgeryError: for a file or row that cannot be used. The message names the file and the row.
    """
    files = files_of_text(data)
    sources: list[tuple[Any, Iterator]] = [(data, _rows_of_data_set(data))]
    if files is not None:
        sources = [(path, _rows(path)) for path in files]
    kinds = set()
    for source, rows in sources:
        try:
            fields: tuple[str, ...] = ()
            for where, row in rows:
                document = _document_of(row, where)
                if isinstance(document, Conversation):
                    if fields and fields != document.fields:
                        raise ValueError(
                            f"{where} has {' and '.join(document.fields)}, but earlier rows have {' and '.join(fields)}"
                        )
                    fields = document.fields
                    document = document._replace(where=f"{where} of {source}")
                kinds.add(type(document))
                if len(kinds) > 1:
                    here, before = ("text", "conversations") if isinstance(document, str) else ("conversation", "texts")
                    raise ValueError(f"{where} is a {here}, but earlier rows are {before}")
                yield document
        except ValueError as error:  # from reading the file, or from the checks of a row
            raise _unreadable(source, error) from error


def _unreadable(source: object, error: ValueError) -> SurgeryError:
    return SurgeryError(f"{source} cannot be used: {error}. Correct it or leave it out.")


def _rows_of_data_set(name: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row): each row in the split "train" of a hub's data set, and its place for error messages.

    Args:
        name: NAME or NAME:CONFIG on Hugging Face, or the same after "modelscope:" on ModelScope. Downloaded if needed.

    Raises:
        SurgeryError: if there is no such data set.
    """
    import datasets  # this import takes a second, and reading files does not need it

    hub, repo, config = _data_set_named(name)
    try:
        place = _from_modelscope(repo) if hub == "modelscope" else repo
        rows: Iterable[Any] = datasets.load_dataset(place, config, split="train")
    except Exception as error:  # datasets and the hubs' clients raise exceptions of many kinds
        raise SurgeryError(
            f"{name} is neither a file nor a folder, and no data set could be loaded ({one_line(error)}). Give a "
            f"data set as {_NAMES} (HF_ENDPOINT may name a mirror of Hugging Face), or the folder of a copy."
        ) from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _data_set_named(name: str) -> tuple[str | None, str, str | None]:
    """Split the name of a data set into (hub, repository, configuration). Hub and configuration may be None."""
    given = _DATA_SET.fullmatch(name)
    if given is None:
        raise SurgeryError(f"{name} is neither a file nor a folder, nor the name of a data set: {_NAMES}.")
    return given[1], given[2], given[3]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, row): each row of a file, and its place for error messages. A .txt or .md file is one row."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            needed = ["text"] if "text" in names else [name for name in names if name in _COLUMNS]
            if not needed:
                raise ValueError(
                    f'its columns are {", ".join(names)}; it needs "text", or a conversation\'s fields: {_FIELDS}'
                )
            rows = (row for batch in table.iter_batches(columns=needed) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    elif suffix == ".jsonl":
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", _parsed(line, f"line {number}")
    else:
        yield "it", {"text": read_text(path)}


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error.args[0].partition(':')[0]})") from error


def _document_of(row: Any, where: str) -> str | Conversation:
    found = conversation_of(row, where) if isinstance(row, dict) and row.get("text") is None else None
    return _text_of(row, where, f", nor the fields of a conversation: {_FIELDS}") if found is None else found


def _text_of(row: Any, where: str, otherwise: str = "") -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where} has no field "text" with a string{otherwise}')
    return row["text"]


def _cut(text: TextIO, size: int) -> Iterator[Piece]:
    """Yield pieces of about `size` characters, cut after a line end, or else before a space, or else anywhere."""
    piece, is_first = text.read(size), True
    while following := text.read(size):
        cut = piece.rfind("\n") + 1 or max(0, piece.rfind(" ")) or len(piece)
        yield Piece(piece[:cut], is_first, False)
        piece, is_first = piece[cut:] + following, False
    yield Piece(piece, is_first, True)


def _from_modelscope(repo: str) -> str:
    """The folder of a data set's files, which are downloaded if needed."""
    wanted = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.txt", "*.gz", "*.zst", "README.md"]
    try:
        snapshot = fetch_snapshot("modelscope", repo, None, wanted, ignore_patterns=[], repo_type="dataset")
    except NoSnapshot as failure:
        raise SurgeryError(f"ModelScope {failure}") from failure
    if snapshot.trouble:
        logger.warning("ModelScope %s; using %s", snapshot.trouble, snapshot.folder)
    return str(snapshot.folder)
