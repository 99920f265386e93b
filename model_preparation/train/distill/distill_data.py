"""The tokens that a distillation runs on, from text files, from the donor itself, or as the caller has them.

In: .txt files, .jsonl files with a "text" in every line, folders of both, or a Llama that writes its own text. Out:
`TokenData`: sequences of one length. Texts follow each other without padding, the end-of-sequence token between them.
"""

import io
import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.io.digests import blake3_of
from model_preparation.io.text import open_text

HELD_OUT_PART = 1 / 16
MAX_HELD_OUT_TOKENS = 65_536  # what is held out stays in memory
_SUFFIXES = (".txt", ".jsonl")
_PIECE_CHARACTERS = 1 << 20  # of a text, tokenised at once


@dataclass(frozen=True)
class TokenData:
    """Sequences to train on, the last of which are held out.

    Attributes:
        tokens: (sequences, length) int64.
        weights: (sequences, length) float32, how much each position's error counts; None: all alike.

    Raises:
        SurgeryError: for other shapes or kinds of numbers, or fewer than two sequences.
    """

    tokens: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.dtype != torch.int64 or len(self.tokens) < 2:
            raise SurgeryError(
                f"The tokens are {list(self.tokens.shape)} of {self.tokens.dtype}; needed are (sequences, length) of "
                "torch.int64, at least two sequences: one is held out."
            )
        if self.weights is not None and self.weights.shape != self.tokens.shape:
            raise SurgeryError(
                f"The weights are {list(self.weights.shape)}, the tokens {list(self.tokens.shape)}. Give one weight "
                "for each token."
            )

    @property
    def held_out(self) -> int:
        """How many sequences, the last ones, are held out: one in 16, at least one."""
        sequences, length = self.tokens.shape
        return max(1, min(int(sequences * HELD_OUT_PART), MAX_HELD_OUT_TOKENS // length))

    def digest(self) -> str:
        """BLAKE3 of shape and numbers."""
        hasher = blake3(repr(tuple(self.tokens.shape)).encode())
        for tensor in (self.tokens, self.weights):
            if tensor is not None:
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise SurgeryError for a token that the donor does not have."""
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if low < 0 or high >= vocab_size:
            raise SurgeryError(
                f"The tokens go from {low} to {high}, and the donor has {vocab_size} of them. Use its own tokenizer."
            )


def text_files(path: Path) -> list[Path]:
    """The file, or all .txt and .jsonl files in the folder and below it, sorted.

    Raises:
        SurgeryError: if there is none.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise SurgeryError(f"{path} has no .txt and no .jsonl file in it. Give files or a folder of text.")
        return files
    if not path.is_file():
        raise SurgeryError(f"{path} is not there. Give a file or folder of text, or self for text of the donor's own.")
    if path.suffix not in _SUFFIXES:
        raise SurgeryError(f"{path} ends neither in .txt nor in .jsonl. Name it for what it is.")
    return [path]


def digest_of_text(path: Path) -> str:
    """BLAKE3 of all `text_files`: of each one's name relative to the folder, and its own BLAKE3."""
    folder = path if path.is_dir() else path.parent
    named = {file.relative_to(folder).as_posix(): blake3_of(file) for file in text_files(path)}
    return blake3(json.dumps(named).encode()).hexdigest()


def tokens_of_text(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int, advance: Callable[[int], None]
) -> Tensor:
    """The first `tokens` tokens of the texts, or all there are, as (sequences, length) int64.

    Long texts are tokenised in pieces, as far as they are needed; only where two pieces meet can the tokens be others
    than those of the whole.

    Args:
        advance: told the tokens of each piece.

    Raises:
        SurgeryError: if the texts fill fewer than two sequences, or a file cannot be read.
    """
    end = tokenizer.eos_token_id
    wanted = math.ceil(tokens / length) * length
    stream = array("i")
    for piece in _pieces_of(files):
        # Long texts are no warning's business: they are cut below.
        found = tokenizer(piece.text, add_special_tokens=piece.begins, verbose=False)["input_ids"]
        ended = end is None or found[-1:] == [end]
        if piece.ends and not ended:
            found.append(end)
        elif piece.begins and not piece.ends and end is not None and ended:
            found.pop()  # set there by the tokenizer, and the text goes on
        stream.extend(found)
        advance(len(found))
        if len(stream) >= wanted:
            break
    sequences = min(len(stream), wanted) // length
    if sequences < 2:
        raise SurgeryError(
            f"The text in {files[0]}{' and others' if len(files) > 1 else ''} has {len(stream)} tokens; at least two "
            f"sequences of {length} are needed. Give more text, or a smaller --sequence_length."
        )
    return torch.frombuffer(stream, dtype=torch.int32)[: sequences * length].long().view(sequences, length)


class _Piece(NamedTuple):
    """Part of a text; whether it is the text's first, and its last."""

    text: str
    begins: bool
    ends: bool


def _pieces_of(files: list[Path]) -> Iterator[_Piece]:
    for path in files:
        try:
            with open_text(path) as file:
                if path.suffix == ".txt":
                    yield from _cut(file)
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from _cut(io.StringIO(_text_of(line, f"line {number}")))
        except ValueError as error:
            raise SurgeryError(f"{path} cannot be used ({error}). Mend it or leave it out.") from error


def _cut(text: TextIO) -> Iterator[_Piece]:
    """The text in pieces, cut behind a line; before a blank where a line is longer; anywhere where there is none."""
    piece, begins = text.read(_PIECE_CHARACTERS), True
    while following := text.read(_PIECE_CHARACTERS):
        cut = piece.rfind("\n") + 1 or max(0, piece.rfind(" ")) or len(piece)
        yield _Piece(piece[:cut], begins, False)
        piece, begins = piece[cut:] + following, False
    yield _Piece(piece, begins, True)


def _text_of(line: str, where: str) -> str:
    fields = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise ValueError(f'{where} is no JSON object with a string "text"')
    return fields["text"]
