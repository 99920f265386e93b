"""The tokens of a distillation: from text files, from text that the donor writes, or from the caller's tensor.

The tokens are made once and kept in the work folder. Texts follow each other without padding, each with an
end-of-sequence token after it.
"""

import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import has_tokenizer
from model_preparation.io.digests import blake3_of
from model_preparation.io.progress import bar
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.train import texts
from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.self_sampling import SEQUENCES_AT_ONCE, SelfSampler, batch_seed
from model_preparation.train.distill.settings import SELF, DistillSettings
from model_preparation.train.distill.work_folder import WorkFolder

HELD_OUT_PART = 1 / 16
MAX_HELD_OUT_TOKENS = 65_536  # held-out tokens stay in memory
_SUFFIXES = (".txt", ".jsonl")
_PIECE_CHARACTERS = 1 << 20  # longer texts are tokenised in pieces of this size


@dataclass(frozen=True)
class TokenData:
    """Sequences to train on; the last ones are held out.

    Attributes:
        tokens: (sequences, length) int64.
        weights: (sequences, length) float32, the weight of each position's error; None: equal weights.

    Raises:
        SurgeryError: for other shapes or dtypes, or fewer than two sequences.
    """

    tokens: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.dtype != torch.int64 or len(self.tokens) < 2:
            raise SurgeryError(
                f"The tokens have shape {list(self.tokens.shape)} and dtype {self.tokens.dtype}. Give int64 tokens of "
                "shape (sequences, length), at least two sequences. One is held out."
            )
        if self.weights is not None and self.weights.shape != self.tokens.shape:
            raise SurgeryError(
                f"The weights have shape {list(self.weights.shape)}, the tokens {list(self.tokens.shape)}. Give one "
                "weight for each token."
            )

    @property
    def held_out(self) -> int:
        """The number of held-out sequences: one in 16, at most `MAX_HELD_OUT_TOKENS` tokens, but at least one."""
        sequences, length = self.tokens.shape
        return max(1, min(int(sequences * HELD_OUT_PART), MAX_HELD_OUT_TOKENS // length))

    def digest(self) -> str:
        """BLAKE3 of the tokens' shape, the tokens and the weights, in hex."""
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
                f"Token ids go from {low} to {high}, but the donor has only {vocab_size} tokens. "
                "Use the donor's tokenizer."
            )


Data = TokenData | str | Path


def described(data: Data, settings: DistillSettings) -> dict[str, Any]:
    """The settings that change the tokens, as JSON values for the work folder. Only "self" depends on the seed.

    Raises:
        SurgeryError: if `data` names no text.
    """
    if isinstance(data, TokenData):
        return {"data": data.digest()}
    asked = {"tokens": settings.tokens, "sequence_length": settings.sequence_length}
    if data == SELF:
        return {"data": SELF, **asked, "seed": settings.seed}
    path = Path(data).expanduser()
    folder = path if path.is_dir() else path.parent
    named = {file.relative_to(folder).as_posix(): blake3_of(file) for file in text_files(data)}
    return {"data": blake3(json.dumps(named).encode()).hexdigest(), **asked}


def most_tokens(data: Data, settings: DistillSettings) -> int:
    """An upper bound of the number of tokens: a text has at most one token per byte.

    Raises:
        SurgeryError: if `data` names no text.
    """
    if isinstance(data, TokenData):
        return data.tokens.numel()
    length = settings.sequence_length
    most = -(-settings.tokens // length) * length
    return most if data == SELF else min(most, sum(file.stat().st_size for file in text_files(data)))


def text_files(data: str | Path) -> list[Path]:
    """The file `data`, or the .txt and .jsonl files in and below the folder `data`. SurgeryError if there are none."""
    return texts.text_files(Path(data).expanduser(), _SUFFIXES, "self for text that the donor writes")


def take_tokens(data: Data, work: WorkFolder, donor: Donor) -> TokenData:
    """The tokens that `work` keeps. If it has no tokens yet, make them and keep them there.

    Raises:
        SurgeryError: for text or tokens that cannot be used, or a donor without a tokenizer.
    """
    kept = work.tokens()
    if kept is not None:
        taken = TokenData(**kept)
    else:
        if isinstance(data, TokenData):
            taken = data
        elif data == SELF:
            taken = TokenData(_drawn(work, donor))
        else:
            taken = TokenData(_read(data, work, donor.folder))
        taken.check_vocabulary(donor.config.vocab_size)
        work.keep_tokens(taken.tokens, taken.weights)
    work.remove_drawn()
    return taken


def tokens_of_text(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int, advance: Callable[[int], None]
) -> Tensor:
    """The first `tokens` tokens of the texts, or all if there are fewer: (sequences, length) int64.

    `tokens` is rounded up to whole sequences, at least two. If there are fewer tokens, an incomplete last sequence is
    left out. Long texts are tokenised in pieces, and only as far as needed. Where two pieces meet, tokens can differ
    from those of a text that is tokenised as a whole.

    Args:
        advance: called with the number of tokens of each piece.

    Raises:
        SurgeryError: if the texts fill fewer than two sequences, or a file cannot be read.
    """
    end = tokenizer.eos_token_id
    wanted = max(2, math.ceil(tokens / length)) * length
    stream = array("i")
    for piece in texts.read_texts(files, _PIECE_CHARACTERS):
        # verbose=False: no warning about long texts, which are cut below.
        found = tokenizer(piece.text, add_special_tokens=piece.is_first, verbose=False)["input_ids"]
        ended = end is None or found[-1:] == [end]
        if piece.is_last and not ended:
            found.append(end)
        elif piece.is_first and not piece.is_last and end is not None and ended:
            found.pop()  # the tokenizer added an end-of-sequence token, but the text continues
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


def _read(data: str | Path, work: WorkFolder, donor_folder: Path) -> Tensor:
    if not has_tokenizer(donor_folder):
        raise SurgeryError(f"{donor_folder} has no tokenizer for the text. Copy it there, or use --data self.")
    length, tokens = (work.settings()[name] for name in ("sequence_length", "tokens"))
    with bar("Tokens", tokens) as advance:
        found = tokens_of_text(text_files(data), load_tokenizer(donor_folder), length, tokens, advance)
    if found.numel() < tokens:
        print(
            f"The text has {found.numel():,} tokens in whole sequences; --tokens is {tokens:,}. "
            "All of these sequences are used.",
            flush=True,
        )
    return found


def _drawn(work: WorkFolder, donor: Donor) -> Tensor:
    """The tokens that the donor writes, (sequences, length) int64. Each complete batch is saved to the disk."""
    asked = work.settings()
    length = asked["sequence_length"]
    sequences = max(2, -(-asked["tokens"] // length))
    print(f"The donor writes {sequences * length:,} tokens ...", flush=True)
    sampler = None
    parts = []
    with bar("Tokens", asked["tokens"]) as advance:
        for number, first in enumerate(range(0, sequences, SEQUENCES_AT_ONCE)):
            part = work.drawn(number)
            if part is None:
                sampler = sampler or SelfSampler(donor.folder, donor.config, donor.device)
                seed = batch_seed(asked["seed"], number)
                part = sampler.draw(min(SEQUENCES_AT_ONCE, sequences - first), length, seed, advance)
                work.keep_drawn(number, part)
            else:
                advance(part.numel())
            parts.append(part)
    return torch.cat(parts)
