"""One cache of a prefix, read by any number of rows that begin with it.

In: the cache a model filled with the prefix, batch 1. Out: a cache for a batch of continuations, which shares the
prefix's tensors instead of repeating them and keeps nothing of what the continuations add: it is for scoring, where a
row is read once. So it can serve one batch after another, and its memory does not grow with the batch.
"""

import copy

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from model_preparation.llamba.cache_llamba import MambaStateLayer


def can_share(cache: Cache | None) -> bool:
    """Whether every layer of a filled cache is of a kind that `shared` knows."""
    return cache is not None and all(type(layer) in (DynamicLayer, MambaStateLayer) for layer in cache.layers)


def shared(prefix: Cache, rows: int) -> Cache:
    """A cache in which each of `rows` rows comes after the prefix.

    Args:
        prefix: a filled cache of batch 1 for which `can_share` holds. It is not changed, nor by what is run after it.
        rows: the batch of the continuations.
    """
    fork = copy.copy(prefix)  # its count of tokens seen, if it has one, is then its own
    fork.layers = [shared_layer(layer, rows) for layer in prefix.layers]
    return fork


def shared_layer(layer: DynamicLayer | MambaStateLayer, rows: int) -> DynamicLayer | MambaStateLayer:
    """`shared`, for the cache of a single layer."""
    return _SharedKeys(layer, rows) if isinstance(layer, DynamicLayer) else _SharedStates(layer, rows)


class _SharedKeys(DynamicLayer):
    """K and V of an attention layer after the prefix, (rows, heads, tokens, head_dim), as views of one row."""

    def __init__(self, layer: DynamicLayer, rows: int):
        super().__init__()
        self.device, self.is_initialized = layer.device, True
        self.keys = layer.keys.expand(rows, -1, -1, -1)
        self.values = layer.values.expand(rows, -1, -1, -1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The prefix's K and V with the continuations' behind them, for this one use."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _SharedStates(MambaStateLayer):
    """The states of a mixer after the prefix; what comes after the continuations is dropped."""

    def __init__(self, layer: MambaStateLayer, rows: int):
        super().__init__()
        conv_state, state = layer.states()
        assert conv_state is not None  # a filled cache has both
        assert state is not None
        self._conv_state = conv_state.expand(rows, -1, -1)
        self._state = state.expand(rows, -1, -1, -1)

    def states(self) -> tuple[Tensor, Tensor]:
        """(conv state, SSM state) of each row, (rows, conv_dim, d_conv) and (rows, H, P, N)."""
        return self._conv_state, self._state.clone()  # a step of one token writes into its state

    def remember(self, inputs: Tensor, state: Tensor) -> None:
        """Nothing is."""
