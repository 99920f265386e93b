"""The cache of a prefix, for any number of rows that begin with this prefix.

All rows share the prefix's tensors. The cache does not keep what the rows add, because scoring reads each row only
once. So the same cache serves every batch, and its memory does not grow with the number of rows.
"""

import copy

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from model_preparation.llamba.cache_llamba import HybridStateLayer, MambaStateLayer


def can_share(cache: Cache | None) -> bool:
    """Whether `shared` knows the kind of every layer of a filled cache."""
    kinds = (DynamicLayer, MambaStateLayer, HybridStateLayer)
    return cache is not None and all(type(layer) in kinds for layer in cache.layers)


def shared(prefix: Cache, rows: int) -> Cache:
    """A cache from which `rows` rows continue after the prefix.

    Args:
        prefix: a filled cache of batch size 1, for which `can_share` is true. It is not changed.
        rows: the size of the batch.
    """
    fork = copy.copy(prefix)  # this also copies the count of seen tokens, if the cache has one
    fork.layers = [shared_layer(layer, rows) for layer in prefix.layers]
    return fork


def shared_layer(layer: DynamicLayer | MambaStateLayer, rows: int) -> DynamicLayer | MambaStateLayer:
    """The same as `shared`, for one layer of the cache."""
    if isinstance(layer, HybridStateLayer):
        return _SharedBoth(layer, rows)
    return _SharedKeys(layer, rows) if isinstance(layer, DynamicLayer) else _SharedStates(layer, rows)


class _SharedKeys(DynamicLayer):
    """The prefix's K and V in an attention layer, (rows, heads, tokens, head_dim), as views of one row."""

    def __init__(self, layer: DynamicLayer, rows: int):
        super().__init__()
        self._share_keys(layer, rows)

    def _share_keys(self, layer: DynamicLayer, rows: int) -> None:
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.keys = layer.keys.expand(rows, -1, -1, -1)
        self.values = layer.values.expand(rows, -1, -1, -1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The prefix's K and V followed by the new ones; the cache does not keep them."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _SharedStates(MambaStateLayer):
    """The states of a mixer after the prefix. Later states are not kept."""

    def __init__(self, layer: MambaStateLayer, rows: int):
        super().__init__()
        self._share_states(layer, rows)

    def _share_states(self, layer: MambaStateLayer, rows: int) -> None:
        conv_state, state = layer.states()
        assert conv_state is not None  # a filled cache has both
        assert state is not None
        self._conv_state = conv_state.expand(rows, -1, -1)
        self._state = state.expand(rows, -1, -1, -1)

    def states(self) -> tuple[Tensor, Tensor]:
        """(conv state, SSM state) of each row, (rows, conv_dim, d_conv) and (rows, H, P, N)."""
        return self._conv_state, self._state.clone()  # a step of one token would overwrite the shared SSM state

    def remember(self, inputs: Tensor, state: Tensor) -> None:
        """Do nothing: the states after the rows' tokens are not needed."""


class _SharedBoth(_SharedStates, _SharedKeys, HybridStateLayer):
    """Keys, values and states of a mixer with grafted heads."""

    def __init__(self, layer: HybridStateLayer, rows: int):
        HybridStateLayer.__init__(self)
        self._share_keys(layer, rows)
        self._share_states(layer, rows)
