"""Lets a donor write text, as token ids, for runs without other text (--data self).

A batch depends only on its seed, so a resumed run can keep the batches of the run before.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import load_folder
from model_preparation.llamba.cache_llamba import CACHE_NAME

SEQUENCES_AT_ONCE = 64


class SelfSampler:
    """Draws sequences from a donor, by default without a prompt, at temperature 1, from the whole vocabulary.

    The model runs in bfloat16: rounding matters little for random draws. A sequence continues after an end-of-sequence
    token, as in the packed text that models are trained on.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig, device: str):
        self._start = first_token(config)
        disable_progress_bar()  # transformers' bar would break the bar that counts tokens
        self._model = load_folder(folder, torch.bfloat16).to(device)

    @torch.inference_mode()
    def draw(
        self,
        sequences: int,
        length: int,
        seed: int,
        advance: Callable[[int], None],
        *,
        begin: Sequence[int] = (),
        steer: Callable[[list[int]], list[int] | None] | None = None,
    ) -> Tensor:
        """Draw token ids, (sequences, length) int64, on the CPU.

        Args:
            advance: called after each position with the number of tokens drawn there.
            begin: the first tokens of each sequence, in place of the donor's first token.
            steer: called with the tokens drawn at a position. Returns the tokens to take instead, or None to stop here.
        """
        device = self._model.device
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.full((sequences, length), self._start, device=device)
        drawn[:, : len(begin)] = torch.tensor(begin, device=device)
        seen, past = 0, None
        for position in range(max(1, len(begin)), length):
            out = self._model(drawn[:, seen:position], **{CACHE_NAME: past}, use_cache=True)
            seen, past = position, out[CACHE_NAME]
            chances = out.logits[:, -1].float().softmax(-1)
            taken = torch.multinomial(chances, 1, generator=generator).squeeze(1)
            if steer is not None:
                steered = steer(taken.tolist())
                if steered is None:
                    break
                taken = torch.tensor(steered, device=device)
            drawn[:, position] = taken
            advance(sequences)
        return drawn.cpu()


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch `number` in a run. Runs with neighbouring seeds share no seed of a batch."""
    return (seed * 1_000_003 + number) % 2**63  # torch takes no larger seed


def first_token(config: PreTrainedConfig) -> int:
    """The token that begins the model's texts. SurgeryError if the model's config names none."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            return value
    raise SurgeryError(
        "The donor's config.json has neither bos_token_id nor eos_token_id, so no token can begin its texts. "
        "Give text by --data FILE."
    )
