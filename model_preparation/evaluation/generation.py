"""What a model writes after a prompt, and how fast.

In: a model, its tokenizer, a prompt. Out: a `Generation` with the text, the tokens, and the seconds that the prompt and
the new tokens took. Logits that are not finite are an error, in the prompt as in what follows.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.prompts import Prompt, shown
from model_preparation.io.untrusted.tokenizer_files import apply_chat_template

_POSITIONS_AT_ONCE = 256  # logits of a long prompt over a large vocabulary would not fit into memory


@dataclass(frozen=True)
class Sampling:
    """How new tokens are drawn; without it, the likeliest is taken each time."""

    temperature: float = 1.0
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    top_k: int = 0  # draw among this many of the likeliest; 0 for all
    seed: int = 1234


@dataclass(frozen=True)
class Generation:
    """A continuation of `prompt`. `text` is the new part alone, without special tokens."""

    prompt: Prompt
    text: str
    prompt_tokens: int
    new_ids: tuple[int, ...]  # the new tokens, an end-of-text token included
    prefill_seconds: float  # from the call to the first new token
    decode_seconds: float  # from the first new token to the last

    @property
    def new_tokens(self) -> int:
        return len(self.new_ids)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of the new tokens after the first, which is the prefill's; None where there is just that one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_new_tokens: int = 50,
    sampling: Sampling | None = None,
    chat: bool = False,
) -> Generation:
    """`generate_texts` for a single text."""
    generations = generate_texts(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat, count=1
    )
    return generations[0]


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_new_tokens: int = 50,
    sampling: Sampling | None = None,
    chat: bool = False,
    count: int = 1,
) -> list[Generation]:
    """Continue a prompt, `count` times, until the model's end-of-text token or `max_new_tokens`.

    Args:
        prompt: a text to continue, or messages to answer; messages always go through the tokenizer's chat template.
        max_new_tokens: tokens to write at most.
        sampling: how tokens are drawn; None takes the likeliest each time, whatever the model's own settings.
        chat: put a text into the chat template too, as a user's message.
        count: continuations to make. Each is generated alone, so that its speed is that of one sequence; the n-th, from
            0, is drawn with the seed `sampling.seed + n`, whatever else is generated.

    Raises:
        SurgeryError: if the prompt has no tokens, too many for the model's positions, or needs a chat template that the
            tokenizer lacks or that refuses it; or if logits are not finite.
    """
    input_ids, attention_mask = _encode(tokenizer, prompt, chat, model.device)
    _check_length(model, prompt, input_ids.shape[1], max_new_tokens)
    _check_prompt_logits(model, prompt, input_ids, attention_mask)
    return [
        _continue(model, tokenizer, prompt, input_ids, attention_mask, max_new_tokens, sampling, number)
        for number in range(count)
    ]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None,
    number: int,
) -> Generation:
    prompt_tokens = input_ids.shape[1]
    watch = _StepWatch(prompt)
    settings: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        settings = {"do_sample": True, "temperature": sampling.temperature}
        settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    with _seeded(model.device, None if sampling is None else sampling.seed + number):
        # The check of the prompt has warmed its path up: its kernels are loaded and weights are in memory.
        started = time.perf_counter()
        sequence = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([watch]),
            **settings,
        )[0]
    new_ids = sequence[prompt_tokens:]
    return Generation(
        prompt=prompt,
        text=tokenizer.batch_decode(new_ids[None], skip_special_tokens=True)[0],
        prompt_tokens=prompt_tokens,
        new_ids=tuple(new_ids.tolist()),
        prefill_seconds=watch.times[0] - started,
        decode_seconds=watch.times[len(new_ids) - 1] - watch.times[0],
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (1, prompt tokens), int64."""
    if isinstance(prompt, str) and not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        if tokenizer.chat_template is None:
            raise SurgeryError(
                f"The tokenizer has no chat template for the prompt {shown(prompt)!r:.200}. "
                "Leave out --chat and give plain texts, or put a chat_template.jinja beside the tokenizer's files."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = apply_chat_template(tokenizer, messages)
        except ValueError as error:
            raise SurgeryError(
                f"The chat template refuses the prompt {shown(prompt)!r:.200} ({error}). "
                "Give messages with the roles and in the order that it expects."
            ) from error
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    input_ids, attention_mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    if not input_ids.shape[1]:
        raise SurgeryError(f"The prompt {shown(prompt)!r} has no tokens. Give at least one word.")
    return input_ids, attention_mask


def _check_length(model: PreTrainedModel, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise SurgeryError(
            f"The prompt {shown(prompt)!r:.80} has {prompt_tokens} tokens, and with {max_new_tokens} new ones it is "
            f"longer than the {limit} positions of the model. Shorten it, or lower --max_new_tokens."
        )


def _check_prompt_logits(model: PreTrainedModel, prompt: Prompt, input_ids: Tensor, attention_mask: Tensor) -> None:
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        for part in hidden.split(_POSITIONS_AT_ONCE, dim=1):  # (1, positions, width)
            if not head(part).isfinite().all():
                raise _not_finite(f"in the prompt {shown(prompt)!r}")


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Random numbers from `seed` within the block, and after it, on the CPU and CUDA, as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _StepWatch(LogitsProcessor):
    """Sees the scores of every new token, (1, vocabulary), and passes them on: notes the time, refuses NaN and +inf."""

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The maximum is finite only if nothing is NaN or +inf; single tokens may be forbidden with -inf.
        # Reading it waits for the device, so the time noted is that of work done.
        if not scores.max().isfinite().item():
            raise _not_finite(f"at new token {len(self.times) + 1} after the prompt {shown(self.prompt)!r}")
        self.times.append(time.perf_counter())
        return scores


def _not_finite(where: str) -> SurgeryError:
    return SurgeryError(
        f"The model's logits are not finite {where}. "
        "Try --dtype float32; if that fails too, build the checkpoint again."
    )
