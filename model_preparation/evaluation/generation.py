"""What a model writes after a prompt, and how fast.

In: a model, its tokenizer, a prompt. Out: a `Generation` with the text, the token counts, and the seconds that the
prompt and the new tokens took. Logits that are not finite are an error, in the prompt as in what follows.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError


@dataclass(frozen=True)
class Generation:
    """A continuation of `prompt`. `text` is the new part alone, without special tokens."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # from the call to the first new token
    decode_seconds: float  # from the first new token to the last

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of the new tokens after the first, which is the prefill's; None where there is just that one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_new_tokens: int = 50
) -> Generation:
    """Continue a prompt, greedily, until the model's end-of-text token or `max_new_tokens`.

    Raises:
        SurgeryError: if the prompt has no tokens, or logits are not finite.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]  # (1, prompt tokens), int64
    prompt_tokens = input_ids.shape[1]
    if not prompt_tokens:
        raise SurgeryError(f"The prompt {prompt!r} has no tokens. Give at least one word.")
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits  # (1, prompt tokens, vocabulary)
    if not logits.isfinite().all():
        raise _not_finite(f"in the prompt {prompt!r}")

    watch = _StepWatch(prompt)
    # The forward pass above was the warm-up too: kernels are loaded and weights are in memory.
    started = time.perf_counter()
    sequence = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([watch]),
    )[0]
    new_tokens = len(sequence) - prompt_tokens
    return Generation(
        prompt=prompt,
        text=tokenizer.batch_decode(sequence[None, prompt_tokens:], skip_special_tokens=True)[0],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=watch.times[0] - started,
        decode_seconds=watch.times[new_tokens - 1] - watch.times[0],
    )


class _StepWatch(LogitsProcessor):
    """Sees the scores of every new token, (1, vocabulary), and passes them on: notes the time, refuses NaN and +inf."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The maximum is finite only if nothing is NaN or +inf; single tokens may be forbidden with -inf.
        # Reading it waits for the device, so the time noted is that of work done.
        if not scores.max().isfinite().item():
            raise _not_finite(f"at new token {len(self.times) + 1} after the prompt {self.prompt!r}")
        self.times.append(time.perf_counter())
        return scores


def _not_finite(where: str) -> SurgeryError:
    return SurgeryError(
        f"The model's logits are not finite {where}. "
        "Try --dtype float32; if that fails too, build the checkpoint again."
    )
