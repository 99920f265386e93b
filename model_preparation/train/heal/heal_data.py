"""Text as training sequences, in an order that depends on the seed and the position alone.

In: a text, JSON-lines or Parquet file, a folder of such, or a data set's name. Out: `Sequences`, blocks of tokens cut
from the joined texts; and `Shuffled`, the order in which they are seen: what a run sees at a position is the same
however many processes share the work, and wherever it was stopped.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.hub.download import NoSnapshot, fetch_snapshot
from model_preparation.io.text import open_text, read_text

_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_DOCUMENTS_AT_ONCE = 256
_DATA_SET = re.compile(r"(?:(modelscope|huggingface):)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?", re.ASCII)
_NAMES = "org/name or org/name:config, on ModelScope modelscope:org/name"

logger = logging.getLogger(__name__)


class Sequences(Dataset):
    """Sequences of `block_size` tokens each: item i is {"input_ids", "labels"}, both (block_size,) int64.

    Attributes:
        tokens: (sequences, block_size) int32.
    """

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def digest(self) -> str:
        """BLAKE3 of the tokens, in hex."""
        return blake3(self.tokens.tobytes()).hexdigest()


class Shuffled(Dataset):
    """`count` sequences from position `start` on of an endless row of shuffled passes over `sequences`.

    Pass k is a permutation drawn from (seed, k).
    """

    def __init__(self, sequences: Sequences, seed: int, start: int, count: int):
        self._sequences = sequences
        self._seed = seed
        self._start = start
        self._count = count
        self._order: tuple[int, np.ndarray] | None = None  # of the pass last asked for

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, place = divmod(self._start + index, len(self._sequences))
        if self._order is None or self._order[0] != number:
            self._order = number, np.random.default_rng((self._seed, number)).permutation(len(self._sequences))
        return self._sequences[int(self._order[1][place])]


def load_sequences(data: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Sequences:
    """Read texts, join them with the end-of-text token after each, and cut them into blocks; the rest is dropped.

    Args:
        data: a .txt or .md file, a .jsonl or .parquet file with a field "text" in every row, a folder of such, or
            the name of a data set whose split "train" has that field: NAME or NAME:CONFIG on Hugging Face, and with
            "modelscope:" before it on ModelScope.

    Raises:
        SurgeryError: if there is no such thing, a line has no text, or there are fewer tokens than one block has.
    """
    pieces: list[np.ndarray] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = _texts(data)
    while some := [text for _, text in zip(range(_DOCUMENTS_AT_ONCE), documents, strict=False)]:
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [np.array(ids + end, dtype=np.int32) for ids in encoded]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    count = len(tokens) // block_size
    if not count:
        raise SurgeryError(
            f"{data} is shorter than one sequence: {len(tokens)} of {block_size} tokens. "
            "Give more text, or a smaller --block_size."
        )
    return Sequences(tokens[: count * block_size].reshape(count, block_size))


def hold_out(sequences: Sequences, fraction: float) -> tuple[Sequences, Sequences]:
    """(for training, held out): evenly spaced sequences are held out, at least one.

    Raises:
        SurgeryError: if none would be left to train on.
    """
    count = max(1, round(len(sequences) * fraction))
    if count >= len(sequences):
        raise SurgeryError(
            f"Of {len(sequences)} sequences none is left to train on if {count} are held out. "
            "Give more text, a smaller --block_size, or --eval_data."
        )
    held_out = np.zeros(len(sequences), dtype=bool)
    held_out[np.linspace(0, len(sequences) - 1, count).round().astype(int)] = True
    return Sequences(sequences.tokens[~held_out]), Sequences(sequences.tokens[held_out])


def _texts(data: str) -> Iterator[str]:
    if not data:
        raise SurgeryError("The text is named by nothing. Give a file, a folder, or the name of a data set.")
    path = Path(data).expanduser()
    if path.is_file():
        yield from _texts_in_file(path)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise SurgeryError(f"{path} holds no {', '.join(_SUFFIXES)} files. Give a folder with text in it.")
        for file in files:
            yield from _texts_in_file(file)
    elif path.is_absolute() or data.startswith(".") or path.suffix in _SUFFIXES:
        raise SurgeryError(f"{path} is not there. Give a file, a folder, or the name of a data set.")
    else:
        yield from _texts_of_data_set(data)


def _texts_in_file(path: Path) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise SurgeryError(
            f"{path} ends in none of {', '.join(_SUFFIXES)}, which say how it is read. "
            "Save JSON as an object per line in .jsonl, a table as .parquet, plain text as .txt."
        )
    try:
        if suffix == ".parquet":
            yield from _texts_in_table(path)
            return
        if suffix != ".jsonl":
            yield read_text(path)
            return
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(_row(line, f"{path}, line {number}"), f"{path}, line {number}")
    except ValueError as error:  # no UTF-8, no JSON, or what pyarrow raises
        raise SurgeryError(
            f"{path} cannot be read as text: {error}. Save JSON lines in .jsonl, tables in .parquet, all else in .txt."
        ) from error


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise SurgeryError(
            f"{where} is no JSON ({error.args[0].partition(':')[0]}). Save an object per line."
        ) from error


def _texts_in_table(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        columns = table.schema_arrow.names
        if "text" not in columns:
            raise SurgeryError(f'{path} has no column "text"; it has {", ".join(columns)}.')
        number = 0
        for batch in table.iter_batches(columns=["text"]):
            for row in batch.to_pylist():
                number += 1
                yield _text_of(row, f"{path}, row {number}")


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise SurgeryError(f'{where} has no string "text". Every row needs that field.')
    return row["text"]


def _texts_of_data_set(name: str) -> Iterator[str]:
    import datasets  # a second of imports, for names only

    given = _DATA_SET.fullmatch(name)
    if given is None:
        raise SurgeryError(f"{name} is neither a file nor a folder, nor the name of a data set: {_NAMES}.")
    hub, repo, config = given.groups()
    try:
        place = _from_modelscope(repo) if hub == "modelscope" else repo
        rows: Sequence[Any] = datasets.load_dataset(place, config, split="train")
    except Exception as error:  # its own, the hub client's, and plain ones
        reason = " ".join(str(error).split())[:200]
        raise SurgeryError(
            f"{name} is neither a file nor a folder, and no data set to be had ({reason}). Give its name as {_NAMES} "
            "(HF_ENDPOINT may name a mirror of Hugging Face), or a folder that it was downloaded to."
        ) from error
    for number, row in enumerate(rows):
        yield _text_of(row, f"{name}, row {number}")


def _from_modelscope(repo: str) -> str:
    """The folder with a data set's files, downloaded if need be."""
    wanted = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.txt", "*.gz", "*.zst", "README.md"]
    try:
        snapshot = fetch_snapshot("modelscope", repo, None, wanted, ignore_patterns=[], repo_type="dataset")
    except NoSnapshot as failure:
        raise SurgeryError(f"ModelScope {failure}") from failure
    if snapshot.trouble:
        logger.warning("ModelScope %s; using %s", snapshot.trouble, snapshot.folder)
    return str(snapshot.folder)
