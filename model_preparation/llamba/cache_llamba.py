"""One cache for both kinds of layer.

It holds the convolution and SSM states of Mamba layers, and K/V of grafted layers.
It is transformers' DynamicCache, built from the config's `layer_types`. It also counts the tokens seen, so that a model
without attention layers can continue a prompt. Layers with a sliding window keep all K/V too: with padding between
tokens, transformers' own sliding caches would drop tokens that the window still holds.
"""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from transformers.masking_utils import create_causal_mask

from .configuration_llamba import LlambaConfig

# The installed transformers' name of the cache in arguments and outputs: `past_key_values` until 5.23, then `cache`.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class MambaStateLayer(LinearAttentionLayer):
    """States of one mixer: `conv_states[0]` (batch, conv_dim, d_conv) and `recurrent_states[0]` (batch, H, P, N)."""

    # Otherwise generate would build masks for torch.compile, and the mixers cannot use those.
    is_compileable = False

    def states(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(conv state, SSM state) after the tokens seen so far; (None, None) before the first."""
        return (self.conv_states[0], self.recurrent_states[0]) if self.has_previous_state[0] else (None, None)

    def remember(self, inputs: torch.Tensor, state: torch.Tensor) -> None:
        """Store the states for the next call of `states`. They may be the stored tensors, changed in place.

        Where gradients are recorded, nothing is changed in place: the backward pass needs the old states.
        """
        if not self.has_previous_state[0]:
            self.update_conv_state(inputs)
        elif torch.is_grad_enabled():
            self.conv_states[0], self.recurrent_states[0] = inputs, state
            return
        else:
            # update_conv_state would append to the old inputs first, which takes a quarter of a decode step.
            self.conv_states[0].copy_(inputs)
        self.update_recurrent_state(state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row's state `repeats` times."""
        self.reorder_cache(torch.arange(self.conv_states[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, in that order."""
        self.reorder_cache(indices)


def _detached(value: object) -> object:
    if isinstance(value, dict):
        return {key: _detached(each) for key, each in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value


class HybridStateLayer(MambaStateLayer, LinearAttentionAndFullAttentionLayer):
    """The states of a Mamba block with grafted heads, and the K/V of those heads."""


_CACHE_LAYERS = {"linear_attention": MambaStateLayer, "hybrid": HybridStateLayer}


class LlambaCache(DynamicCache):
    """The cache of a [`LlambaForCausalLM`]: the argument `past_key_values` or `cache`.

    Args:
        config: the model's. Each entry of `config.layer_types` gets a cache layer.
    """

    layers: list

    def __init__(self, config: LlambaConfig):
        super().__init__()
        self.layers = [_CACHE_LAYERS.get(kind, DynamicLayer)() for kind in config.layer_types]
        self.seen_tokens = 0  # the model adds each segment's length, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included: the same number in every layer."""
        return self.seen_tokens

    @property
    def is_linear(self) -> list[bool]:
        """Per layer, whether it has a state and no K/V. Never all True: `generate` would then find no length."""
        kinds = super().is_linear
        return kinds if not all(kinds) else [False] * len(kinds)

    def detach(self) -> None:
        """Stop the gradients of later tokens at the stored tensors."""
        for layer in self.layers:
            for name in ("keys", "values", "conv_states", "recurrent_states"):
                if hasattr(layer, name):
                    setattr(layer, name, _detached(getattr(layer, name)))

    def reset(self) -> None:
        """Empty the cache."""
        self.layers = [type(layer)() for layer in self.layers]  # K/V layers would keep their length otherwise
        self.seen_tokens = 0
