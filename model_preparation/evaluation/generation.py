"""Let a model continue a prompt, and measure the time. If a logit is not finite, an error is raised."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.prompt_files import Prompt, shown
from model_preparation.evaluation.settings import GenerationSettings
from model_preparation.io.untrusted.untrusted_tokenizer import apply_chat_template

_POSITIONS_AT_ONCE = 256  # the logits of a whole long prompt may not fit into memory


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
        """Speed of the new tokens after the first one, which belongs to the prefill. None if there is only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: GenerationSettings | None = None,
    **changes: Any,
) -> Generation:
    """Write one text: `generate_texts` with `num_return_sequences` 1."""
    return generate_texts(model, tokenizer, prompt, settings, **changes, num_return_sequences=1)[0]


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: GenerationSettings | None = None,
    **changes: Any,
) -> list[Generation]:
    """Continue a prompt until the model's end-of-text token or `max_new_tokens`.

    Each text is generated alone. So its speed is the speed of one sequence, and the text depends on its own seed only.

    Args:
        prompt: a text to continue, or messages to answer.
        settings: how the model writes; by default `GenerationSettings()`.
        changes: fields of `GenerationSettings`, which replace those in `settings`.

    Raises:
        SurgeryError: if the prompt has no tokens, or too many for the model's positions; if the tokenizer has no chat
            template, or its template refuses the prompt; if a logit is not finite.
    """
    settings = replace(settings or GenerationSettings(), **changes)
    input_ids, attention_mask = _encode(tokenizer, prompt, settings.chat, model.device)
    _check_length(model, prompt, input_ids.shape[1], settings.max_new_tokens)
    _check_prompt_logits(model, prompt, input_ids, attention_mask)
    generations = []
    for number in range(settings.num_return_sequences):
        watch = _StepWatch(prompt)
        sampling = dict(settings.sampling or {})
        with _seeded(model.device, sampling.pop("seed") + number if sampling else None):
            # The time includes no warm-up: the check of the prompt has loaded the kernels and read the weights.
            started = time.perf_counter()
            sequence = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=settings.max_new_tokens,
                logits_processor=LogitsProcessorList([watch]),
                do_sample=bool(sampling),
                **sampling,
            )[0]
        new_ids = sequence[input_ids.shape[1] :]
        generations.append(
            Generation(
                prompt=prompt,
                text=tokenizer.batch_decode(new_ids[None], skip_special_tokens=True)[0],
                prompt_tokens=input_ids.shape[1],
                new_ids=tuple(new_ids.tolist()),
                prefill_seconds=watch.times[0] - started,
                decode_seconds=watch.times[len(new_ids) - 1] - watch.times[0],
            )
        )
    return generations


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
                "Leave out --chat and give plain texts, or put a chat_template.jinja into the tokenizer's folder."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = apply_chat_template(tokenizer, messages)
        except ValueError as error:
            raise SurgeryError(
                f"The chat template refuses the prompt {shown(prompt)!r:.200} ({error}). "
                "Give messages with the roles and the order that the template expects."
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
                raise not_finite(f"in the prompt {shown(prompt)!r}")


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Within the block, torch's random numbers come from `seed`. After the block, its generators are as before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _StepWatch(LogitsProcessor):
    """Records the time of every new token. Raises an error if scores, (1, vocabulary), have NaN or +inf."""

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # -inf forbids single tokens and is fine; NaN and +inf would be the maximum.
        # Reading the maximum waits for the device, so the time includes all work.
        if not scores.max().isfinite().item():
            raise not_finite(f"at new token {len(self.times) + 1} after the prompt {shown(self.prompt)!r}")
        self.times.append(time.perf_counter())
        return scores


def not_finite(where: str) -> SurgeryError:
    return SurgeryError(
        f"The model's logits are not finite {where}. "
        "Try --dtype float32; if that fails too, build the checkpoint again."
    )
