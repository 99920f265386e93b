"""Cuts long sequences into segments, which are trained one by one to save memory (truncated backpropagation).

The states of Mamba layers and the K/V of grafted layers pass from segment to segment. Gradients do not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.train.heal.conversation_tokens import NOT_COUNTED
from model_preparation.train.heal.losses import next_tokens


def segments(
    batch: Mapping[str, Tensor], length: int, config: LlambaConfig, width: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield the segments of a batch, at most `length` tokens each, with `targets` in place of `labels`.

    Compute the gradients of a segment before you ask for another. A segment also has the cache, its `start`, and
    `skipped`: for each row, how many targets earlier segments had. If `length` is 0, or neither the batch nor
    `width` is longer, the batch itself is the only segment, and has none of these.

    Args:
        batch: tensors (batch, tokens), and `sequence`, (batch, 1).
        config: of the model that is trained.
        width: rows are padded to this many tokens, so that all processes have equally many segments.
    """
    inputs = dict(batch)
    targets = next_tokens(inputs.pop("labels"))
    if not length or max(width, targets.shape[1]) <= length:
        yield {**inputs, "targets": targets}
        return
    inputs["targets"] = targets
    missing = max(0, width - targets.shape[1])
    for name, value in inputs.items():
        if name != "sequence":
            inputs[name] = pad(value, (0, missing), value=NOT_COUNTED if name == "targets" else 0)
    cache = LlambaCache(config)
    for start in range(0, inputs["targets"].shape[1], length):
        first = {"attention_mask": 0, "sequence": None}  # the mask also covers the tokens of earlier segments
        segment = {name: value[:, first.get(name, start) : start + length] for name, value in inputs.items()}
        skipped = (inputs["targets"][:, :start] != NOT_COUNTED).sum(1)
        yield {**segment, CACHE_NAME: cache, "use_cache": True, "start": start, "skipped": skipped}
        cache.detach()
