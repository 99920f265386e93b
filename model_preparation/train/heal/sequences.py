"""Blocks of tokens to train on, and the order in which a run sees them.

The order depends on the seed and the position alone: not on the number of processes, nor on where a run stopped.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from blake3 import blake3
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.train.texts import files_of_text, read_data_set, read_texts

_DOCUMENTS_AT_ONCE = 256


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
    """`count` sequences from position `start` on, out of endless passes over `sequences`.

    Pass k has every sequence once, in an order drawn from (seed, k). Each item also has its number, `sequence` (1,).
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
        index = int(self._order[1][place])
        return {**self._sequences[index], "sequence": torch.tensor([index])}


def load_sequences(data: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Sequences:
    """Join all texts, the end-of-text token after each, and cut them into blocks. The rest is dropped.

    Args:
        data: as `files_of_text` takes it.

    Raises:
        SurgeryError: if there is no such text, or it has fewer tokens than one block.
    """
    pieces: list[np.ndarray] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = _documents(data)
    while some := list(islice(documents, _DOCUMENTS_AT_ONCE)):
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


def _documents(data: str) -> Iterator[str]:
    files = files_of_text(data)
    return read_data_set(data) if files is None else (piece.text for piece in read_texts(files))


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
