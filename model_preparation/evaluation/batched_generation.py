"""Greedy generation for many prompts at once: the texts of transformers' `generate`, in less time.

The model first reads a few prompts at a time, with little or no padding. Then it writes all texts together. A row
leaves the batch when its text is complete. lm-eval's own loop is slower: it pads all prompts to one length, and goes on
until all texts of the batch contain the same stop sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.evaluation.generation import not_finite
from model_preparation.llamba.cache_llamba import CACHE_NAME, MambaStateLayer

_PLAIN = {"do_sample": False, "temperature": 0.0}


def can_write(model: PreTrainedModel, settings: Mapping[str, Any]) -> bool:
    """Whether `write` supports the model's type, its generation_config, and `settings`, which lm-eval asks for."""
    asked = {name: value for name, value in settings.items() if name not in ("until", "max_gen_toks")}
    own = model.generation_config.to_diff_dict()
    harmless = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length", "use_cache"}
    own = {name for name, value in own.items() if value and not name.startswith("_") and name not in harmless}
    return model.config.model_type in ("llama", "llamba") and asked.items() <= _PLAIN.items() and not own


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    read_at_once: int,
) -> list[str]:
    """Generate the texts that follow tokenized prompts.

    Args:
        prompts: token ids, sorted from the longest prompt to the shortest.
        settings: lm-eval's; `until` (texts that end an answer) and `max_gen_toks` are used.
        read_at_once: the most tokens, with padding, that one forward pass reads; a longer prompt is read alone.

    Raises:
        SurgeryError: for a logit that is not finite.
    """
    stops = [stop for stop in settings["until"] if stop]
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}  # ids of the tokens that end any text
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the texts that are not complete
    logits, mask, cache = _read(model, prompts, read_at_once)
    while True:
        if not bool(logits.isfinite().all()):
            raise not_finite("while it writes")
        chosen = logits.argmax(-1).tolist()
        unfinished = []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            written[row].append(token)
            is_complete = token in ends or len(written[row]) >= settings["max_gen_toks"]
            if not is_complete and stops:
                text = tokenizer.decode(written[row], skip_special_tokens=True)
                is_complete = any(stop in text for stop in stops)
            if not is_complete:
                unfinished.append(place)
        if not unfinished:
            break
        if len(unfinished) < len(rows):
            kept = torch.tensor(unfinished, device=mask.device)
            cache.batch_select_indices(kept)
            mask, rows = mask[kept], [rows[place] for place in unfinished]
        ids = torch.tensor([[chosen[place]] for place in unfinished], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits, cache = _step(model, ids, mask, cache)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
    return [postprocess_generated_text(text, stops, think_end_token=None) for text in texts]


def _read(model: PreTrainedModel, prompts: Sequence[Sequence[int]], read_at_once: int) -> tuple[Tensor, Tensor, Cache]:
    """Read the prompts. Returns logits after each prompt (rows, vocabulary), mask (rows, longest prompt) and cache."""
    found = []
    start = 0
    while start < len(prompts):
        count = max(1, read_at_once // len(prompts[start]))
        ids, mask = _padded(prompts[start : start + count], model.device)
        found.append((mask, *_step(model, ids, mask, None)))
        start += count
    masks, logits, caches = zip(*found, strict=True)
    longest = masks[0].shape[1]
    mask = torch.cat([F.pad(each, (longest - each.shape[1], 0)) for each in masks])
    return torch.cat(logits), mask, _joined(caches, longest)


def _step(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """Run `ids`, the tokens that the cache lacks. Returns logits after the last one (rows, vocabulary), and cache."""
    found = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
        **{CACHE_NAME: cache},
        use_cache=True,
        logits_to_keep=1,
    )
    return found.logits[:, -1], found[CACHE_NAME]


def _joined(caches: Sequence[Cache], longest: int) -> Cache:
    """Join all caches into the first one, which has the longest prompts. The others' K and V are padded on the left."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        first = layers[0]
        if isinstance(first, MambaStateLayer):
            for name in ("conv_states", "recurrent_states"):
                getattr(first, name)[0] = torch.cat([getattr(layer, name)[0] for layer in layers])
        else:
            for name in ("keys", "values"):  # (rows, heads, tokens, head_dim)
                parts = [getattr(layer, name) for layer in layers]
                setattr(first, name, torch.cat([F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts]))
    return caches[0]


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts and their mask, (rows, longest) int64 each, with padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
