"""Sequences of tokens to train on, and their order in a run.

The order depends only on the seed and the position, not on the number of processes or on the step where a run stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from blake3 import blake3
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.train.conversations import Conversation
from model_preparation.train.heal.conversation_tokens import NOT_COUNTED, encode
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.texts import read_documents

_DOCUMENTS_AT_ONCE = 256


class Sequences(Dataset):
    """Sequences of `block_size` tokens each: item i is {"input_ids", "labels"}, both (block_size,) int64.

    Attributes:
        tokens: (sequences, block_size) int32.
        are_conversations: whether they come from conversations.
    """

    are_conversations = False

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    @property
    def size(self) -> int:
        """The number of all tokens."""
        return self.tokens.size

    @property
    def parts(self) -> int:
        """The number of items that can be held out: sequences, or documents in `Documents`."""
        return len(self)

    def take(self, chosen: np.ndarray) -> "Sequences":
        """The sequences or documents for which `chosen`, (parts,) bool, is True."""
        return Sequences(self.tokens[chosen])

    def digest(self) -> str:
        """BLAKE3 of the tokens, in hex."""
        return blake3(self.tokens.tobytes()).hexdigest()

    def __str__(self) -> str:
        return f"{_count(len(self), 'sequence')} of {self.tokens.shape[1]} tokens"


class Documents(Sequences):
    """Sequences of documents that do not see each other: one document per sequence, or with packing as many as fit.

    Item i is {"input_ids", "labels"}, both (tokens,) int64; with packing also `position_ids`, which begin at 0 for each
    document. The first token of a document is no label, because no token predicts it.

    Args:
        documents: (2, tokens) int32 each: ids and labels.
        are_conversations: whether the documents are conversations; otherwise they are texts.
    """

    def __init__(self, documents: Sequence[np.ndarray], settings: HealSettings, *, are_conversations: bool):
        self._documents, self._settings, self.are_conversations = documents, settings, are_conversations
        self._rows = _packed(documents, settings.block_size) if settings.packing else [[each] for each in documents]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, labels = torch.from_numpy(np.concatenate(self._rows[index], axis=1).astype(np.int64))
        item = {"input_ids": ids, "labels": labels}
        if self._settings.packing:
            item["position_ids"] = torch.cat([torch.arange(document.shape[1]) for document in self._rows[index]])
        return item

    @property
    def size(self) -> int:
        return sum(document.shape[1] for document in self._documents)

    @property
    def parts(self) -> int:
        return len(self._documents)

    def take(self, chosen: np.ndarray) -> "Documents":
        documents = [self._documents[index] for index in np.flatnonzero(chosen).tolist()]
        return Documents(documents, self._settings, are_conversations=self.are_conversations)

    def digest(self) -> str:
        """BLAKE3 of ids, labels, and the lengths of the documents in each sequence, in hex."""
        hasher = blake3()
        for row in self._rows:
            hasher.update(repr([document.shape for document in row]).encode())
            hasher.update(b"".join(document.tobytes() for document in row))
        return hasher.hexdigest()

    def __str__(self) -> str:
        size = self._settings.block_size
        documents = _count(sum(map(len, self._rows)), "conversation" if self.are_conversations else "text")
        full = self.size / len(self) / size
        return f"{documents} in {_count(len(self), 'sequence')} of up to {size} tokens, {full:.0%} full"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def collate(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of sequences as tensors (batch, longest) int64. Shorter sequences end in padding without labels.

    Padding needs no mask, because no token sees later tokens. In a batch of packed documents, each token of the padding
    is a document of its own.
    """
    return {
        name: pad_sequence([item[name] for item in items], True, NOT_COUNTED if name == "labels" else 0)
        for name in items[0]
    }


def _packed(documents: Sequence[np.ndarray], block_size: int) -> list[list[np.ndarray]]:
    """Put documents into sequences, the longest first, each into the fullest sequence that has room for it."""
    rows: list[list[np.ndarray]] = []
    by_room: list[list[list[np.ndarray]]] = [[] for _ in range(block_size + 1)]  # rows by the number of free tokens
    for document in sorted(documents, key=lambda document: -document.shape[1]):
        size = document.shape[1]
        room = next((room for room in range(size, block_size + 1) if by_room[room]), None)
        if room is None:
            room = block_size
            by_room[room].append([])
            rows += by_room[room]
        row = by_room[room].pop()
        row.append(document)
        by_room[room - size].append(row)
    return rows


class Shuffled(Dataset):
    """`count` items of an endless series of passes over `sequences`, from position `start` on.

    Pass k has every sequence once, in a random order from (seed, k). An item also has `sequence`, (1,): its index.
    """

    def __init__(self, sequences: Sequences, seed: int, start: int, count: int):
        self._sequences, self._seed, self._start, self._count = sequences, seed, start, count
        self._order: tuple[int, np.ndarray] | None = None  # number and order of the pass that was used last

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, place = divmod(self._start + index, len(self._sequences))
        if self._order is None or self._order[0] != number:
            self._order = number, np.random.default_rng((self._seed, number)).permutation(len(self._sequences))
        index = int(self._order[1][place])
        return {**self._sequences[index], "sequence": torch.tensor([index])}


def load_sequences(
    data: str, tokenizer: PreTrainedTokenizerBase, settings: HealSettings, say: Callable[[str], None]
) -> Sequences:
    """The texts or conversations of `data`, as sequences.

    Texts are joined, with the end-of-text token after each text, and cut into blocks. An incomplete last block is
    dropped. With `packing`, texts stay separate, as conversations do.

    Args:
        data: as `read_documents` takes it.
        say: called with a line about conversations that are dropped or cut.

    Raises:
        SurgeryError: if `data` cannot be read, or does not fill one sequence.
    """
    block_size = settings.block_size
    texts: list[np.ndarray] = []
    conversations: list[np.ndarray] = []
    long: list[tuple[str, int]] = []  # conversations that do not fit: place and length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = read_documents(data)
    while some := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        if plain := [each for each in some if isinstance(each, str)]:
            encoded = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
            texts += [np.array(ids + end, dtype=np.int32) for ids in encoded]
        if rows := [each for each in some if isinstance(each, Conversation)]:
            _check_template(tokenizer, data)
            found = encode(tokenizer, rows, settings.loss_on)
            sizes = [(row.where, tokens.shape[1]) for row, tokens in zip(rows, found, strict=True)]
            long += [(where, size) for where, size in sizes if size > block_size]
            conversations += found
    if conversations:
        return Documents(_fitting(conversations, long, settings, say), settings, are_conversations=True)
    if settings.packing:
        cut = [text[first : first + block_size] for text in texts for first in range(0, len(text), block_size)]
        labelled = [np.stack([ids, np.append(np.int32(NOT_COUNTED), ids[1:])]) for ids in cut if len(ids) > 1]
        if labelled:
            return Documents(labelled, settings, are_conversations=False)
    tokens = np.concatenate(texts) if texts else np.empty(0, np.int32)
    count = len(tokens) // block_size
    if not count:
        raise SurgeryError(
            f"{data} is shorter than one sequence: {len(tokens)} of {block_size} tokens. "
            "Give more text, or a smaller --block_size."
        )
    return Sequences(tokens[: count * block_size].reshape(count, block_size))


def _check_template(tokenizer: PreTrainedTokenizerBase, data: str) -> None:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:  # there is no template, or there are several and no default
        raise SurgeryError(
            f"{data} holds conversations, but the checkpoint's tokenizer has no chat template for them. Give one by "
            "--chat_template FILE, such as the chat_template.jinja of the donor's instruct model."
        ) from error


def _fitting(
    conversations: Sequence[np.ndarray],
    long: Sequence[tuple[str, int]],
    settings: HealSettings,
    say: Callable[[str], None],
) -> list[np.ndarray]:
    """The conversations of at most `block_size` tokens; the settings decide whether longer ones are cut or dropped."""
    size, how = settings.block_size, settings.long_conversations
    if long and how == "error":
        where, length = max(long, key=lambda each: each[1])
        raise SurgeryError(
            f"{len(long)} of {len(conversations)} conversations are longer than --block_size {size}; the longest, "
            f"{where}, has {length} tokens. Give a larger --block_size, or --long_conversations drop or cut."
        )
    taken = [each[:, :size] for each in conversations if how == "cut" or each.shape[1] <= size]
    taken = [each for each in taken if (each[1] != NOT_COUNTED).any()]  # a cut may leave no token to learn
    if long:
        dropped = len(conversations) - len(taken)
        say(
            f"{len(long)} of {len(conversations)} conversations are longer than {size} tokens: {dropped} left out, "
            f"{len(long) - dropped} cut. A cut one is left out too if it has no token to learn."
        )
    if not taken:
        raise SurgeryError(f"No conversation fits into --block_size {size}. Give a larger one.")
    return taken


def hold_out(sequences: Sequences, fraction: float) -> tuple[Sequences, Sequences]:
    """The sequences for training, and those held out: evenly spaced sequences or documents, at least one.

    Raises:
        SurgeryError: if none would be left to train on.
    """
    count = max(1, round(sequences.parts * fraction))
    if count >= sequences.parts:
        raise SurgeryError(
            f"Of {sequences.parts} sequences or documents, none is left to train on if {count} are held out. "
            "Give more text, a smaller --block_size, or --eval_data."
        )
    held_out = np.zeros(sequences.parts, dtype=bool)
    held_out[np.linspace(0, sequences.parts - 1, count).round().astype(int)] = True
    return sequences.take(~held_out), sequences.take(held_out)
