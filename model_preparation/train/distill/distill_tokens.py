"""The tokens of one distillation: had once, by whatever way they come, and kept in its work folder.

In: what the caller gave as data, and the work folder. Out: `TokenData`, the same whenever the distillation goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import has_tokenizer
from model_preparation.io.progress import bar
from model_preparation.io.untrusted.tokenizer_files import load_tokenizer
from model_preparation.train.distill.distill_data import TokenData, digest_of_text, text_files, tokens_of_text
from model_preparation.train.distill.distill_defaults import SELF
from model_preparation.train.distill.self_sampling import SEQUENCES_AT_ONCE, SelfSampler
from model_preparation.train.work_folder import WorkFolder

Data = TokenData | str | Path
Advance = Callable[[float], None]


def described(data: Data, tokens: int, sequence_length: int, seed: int) -> dict[str, Any]:
    """What decides on the tokens, as it stands in the settings; the seed only where text is drawn.

    Raises:
        SurgeryError: if there is no text where `data` says.
    """
    if isinstance(data, TokenData):
        return {"data": data.digest()}
    asked = {"tokens": tokens, "sequence_length": sequence_length}
    if data == SELF:
        return {"data": SELF, **asked, "seed": seed}
    return {"data": digest_of_text(Path(data).expanduser()), **asked}


def most_tokens(data: Data, tokens: int, sequence_length: int) -> int:
    """How many tokens there will be at most: no text has more of them than bytes.

    Raises:
        SurgeryError: if there is no text where `data` says.
    """
    if isinstance(data, TokenData):
        return data.tokens.numel()
    most = -(-tokens // sequence_length) * sequence_length
    if data != SELF:
        most = min(most, sum(file.stat().st_size for file in text_files(Path(data).expanduser())))
    return most


def take_tokens(data: Data, work: WorkFolder, donor_folder: Path, donor: LlamaConfig, device: str) -> TokenData:
    """The tokens that are kept in `work`; where there are none yet they are made, and kept.

    Args:
        donor_folder: the Llama's, for its tokenizer and for its own text.
        donor: its config.
        device: where it writes its own text.

    Raises:
        SurgeryError: for text or tokens that cannot be used, or a donor that lacks what they need.
    """
    taken = work.tokens()
    if taken is None:
        if isinstance(data, TokenData):
            taken = data
        else:
            with bar("Tokens", work.settings()["tokens"]) as advance:
                if data == SELF:
                    taken = TokenData(_drawn(work, donor_folder, donor, device, advance))
                else:
                    taken = TokenData(_read(Path(data).expanduser(), work, donor_folder, advance))
        taken.check_vocabulary(donor.vocab_size)
        work.keep_tokens(taken)
    work.forget_drawn()
    return taken


def _read(path: Path, work: WorkFolder, donor_folder: Path, advance: Advance) -> Tensor:
    if not has_tokenizer(donor_folder):
        raise SurgeryError(f"{donor_folder} has no tokenizer for the text. Copy it there, or use --data self.")
    asked = work.settings()
    tokenizer = load_tokenizer(donor_folder)
    found = tokens_of_text(text_files(path), tokenizer, asked["sequence_length"], asked["tokens"], advance)
    if found.numel() < asked["tokens"]:
        wished = f"--tokens {asked['tokens']:,}"
        print(f"The text has {found.numel():,} tokens, fewer than {wished}: all are taken.", flush=True)
    return found


def _drawn(work: WorkFolder, donor_folder: Path, donor: LlamaConfig, device: str, advance: Advance) -> Tensor:
    """The donor's own text, (sequences, length) int64; each batch is kept when it is drawn."""
    asked = work.settings()
    length = asked["sequence_length"]
    sequences = max(2, -(-asked["tokens"] // length))
    print(f"The donor writes {sequences * length:,} tokens ...", flush=True)
    sampler = None
    parts = []
    for number, first in enumerate(range(0, sequences, SEQUENCES_AT_ONCE)):
        part = work.drawn(number)
        if part is None:
            sampler = sampler or SelfSampler(donor_folder, donor, device)
            # Seeds side by side share no batch; torch takes no larger ones.
            seed = (asked["seed"] * 1_000_003 + number) % 2**63
            part = sampler.draw(min(SEQUENCES_AT_ONCE, sequences - first), length, seed, advance)
            work.keep_drawn(number, part)
        else:
            advance(part.numel())
        parts.append(part)
    return torch.cat(parts)
