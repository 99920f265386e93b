"""The tokens that a distillation runs on, from text files, from the donor itself, or as the caller has them.

In: .txt files, .jsonl files with a "text" in every line, folders of both, or a Llama that writes its own text. Out:
`TokenData`: sequences of one length. Texts follow each other without padding, the end-of-sequence token between them.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.files.digests import blake3_of

HELD_OUT_PART = 1 / 16
MAX_HELD_OUT_TOKENS = 65_536  # what is held out stays in memory
_SUFFIXES = (".txt", ".jsonl")


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


def digests_of(path: Path) -> dict[str, str]:
    """BLAKE3 of each of the `text_files`, by its name relative to the folder."""
    folder = path if path.is_dir() else path.parent
    return {file.relative_to(folder).as_posix(): blake3_of(file) for file in text_files(path)}


def tokens_of_text(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int, advance: Callable[[int], None]
) -> Tensor:
    """The first `tokens` tokens of the texts, or all there are, as (sequences, length) int64.

    Args:
        advance: told the tokens of each text.

    Raises:
        SurgeryError: if the texts fill fewer than two sequences, or a file cannot be read.
    """
    end = tokenizer.eos_token_id
    wanted = math.ceil(tokens / length) * length
    stream: list[int] = []
    for text in _texts(files):
        # Long texts are no warning's business: they are cut below.
        found = tokenizer(text, verbose=False)["input_ids"]
        found += [] if end is None or found[-1:] == [end] else [end]
        stream += found
        advance(len(found))
        if len(stream) >= wanted:
            break
    sequences = min(len(stream), wanted) // length
    if sequences < 2:
        raise SurgeryError(
            f"The text in {files[0]}{' and others' if len(files) > 1 else ''} has {len(stream)} tokens; at least two "
            f"sequences of {length} are needed. Give more text, or a smaller --sequence_length."
        )
    return torch.tensor(stream[: sequences * length]).view(sequences, length)


def _texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            if path.suffix == ".txt":
                yield path.read_text(encoding="utf-8")
                continue
            with path.open(encoding="utf-8") as lines:
                yield from (_text_of(line, f"line {number}") for number, line in enumerate(lines, 1) if line.strip())
        except ValueError as error:
            raise SurgeryError(f"{path} cannot be used ({error}). Mend it or leave it out.") from error


def _text_of(line: str, where: str) -> str:
    fields = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise ValueError(f'{where} is no JSON object with a string "text"')
    return fields["text"]
