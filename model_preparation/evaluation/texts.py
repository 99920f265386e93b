"""Texts after many prompts at once, by the likeliest token: as `generate` writes them, in less time.

A row leaves the batch when its text is complete. Stock lm-eval goes on until one stop sequence is in all texts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.llamba.cache_llamba import CACHE_NAME

_PLAIN = {"do_sample": False, "temperature": 0.0}


def can_write(model: PreTrainedModel, settings: Mapping[str, Any]) -> bool:
    """Whether `write` knows the model's cache, and does what these settings of lm-eval's and the model's own ask."""
    asked = {name: value for name, value in settings.items() if name not in ("until", "max_gen_toks")}
    own = model.generation_config.to_diff_dict()
    harmless = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length", "use_cache"}
    own = {name for name in own if not name.startswith("_") and name not in harmless}
    return model.config.model_type in ("llama", "llamba") and asked == _PLAIN and not own


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
) -> list[str]:
    """The texts after prompts of tokens.

    Args:
        settings: lm-eval's: `until` (texts of which each ends an answer) and `max_gen_toks`.

    Raises:
        SurgeryError: for a logit that is not finite.
    """
    stops = [stop for stop in settings["until"] if stop]
    ends = _ends(model, tokenizer)
    ids, mask = _padded(prompts, model.device)
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # that are not complete
    cache = None
    while True:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **{CACHE_NAME: cache},
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = found.logits[:, -1], found[CACHE_NAME]  # (rows, vocabulary)
        if not bool(logits.isfinite().all()):
            raise SurgeryError(
                "The model's logits are not finite, so it has no text. "
                "Try --dtype float32; if that fails too, build the checkpoint again."
            )
        chosen = logits.argmax(-1).tolist()
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            written[row].append(token)
            is_complete = token in ends or len(written[row]) >= settings["max_gen_toks"]
            if not is_complete and stops:
                text = tokenizer.decode(written[row], skip_special_tokens=True)
                is_complete = any(stop in text for stop in stops)
            if not is_complete:
                going.append(place)
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=mask.device)
            cache.batch_select_indices(kept)
            mask, rows = mask[kept], [rows[place] for place in going]
        ids = torch.tensor([[chosen[place]] for place in going], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
    return [postprocess_generated_text(text, stops, think_end_token=None) for text in texts]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end any text."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts and their mask, (rows, longest) int64 each, with padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
