"""The cache of a Llamba: convolution and SSM states of Mamba layers, keys and values (K/V) of grafted layers.

`LlambaCache` is a DynamicCache of transformers, with a cache layer for each entry of the config's `layer_types`. The
cache also counts the tokens seen, so that a model without attention layers can continue a prompt. Layers with a sliding
window keep the K/V of all tokens. transformers' own sliding caches would count padding, and drop tokens too early.
"""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from transformers.masking_utils import create_causal_mask

from .configuration_llamba import LlambaConfig

# The installed transformers' name for the cache in arguments and outputs: `past_key_values` until 5.23, then `cache`.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class MambaStateLayer(LinearAttentionLayer):
    """One mixer's `conv_states[0]` (batch, conv_dim, d_conv) and `recurrent_states[0]` (batch, H, P, N; see ssd.py)."""

    # With True, `generate` would build masks for torch.compile, and the mixers cannot use such masks.
    is_compileable = False

    def states(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(conv state, SSM state) after the tokens seen so far; (None, None) before the first token."""
        return (self.conv_states[0], self.recurrent_states[0]) if self.has_previous_state[0] else (None, None)

    def remember(self, inputs: torch.Tensor, state: torch.Tensor) -> None:
        """Store the conv state `inputs` and the SSM state `state` for the next call of `states`.

        Both may be the stored tensors themselves, already changed in place. While gradients are recorded, no stored
        tensor is changed in place, because the backward pass needs the old states.
        """
        if not self.has_previous_state[0]:
            self.update_conv_state(inputs)
        elif torch.is_grad_enabled():
            self.conv_states[0], self.recurrent_states[0] = inputs, state
            return
        else:
            # update_conv_state would first append to the old inputs. That takes a quarter of a decode step's time.
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
    """The cache of a [`LlambaForCausalLM`], which takes it as the argument `past_key_values` or `cache`.

    Args:
        config: the model's config. Each entry of `config.layer_types` gets a cache layer.
    """

    layers: list

    def __init__(self, config: LlambaConfig):
        super().__init__()
        self.layers = [_CACHE_LAYERS.get(kind, DynamicLayer)() for kind in config.layer_types]
        self.seen_tokens = 0  # every forward pass adds the length of its input, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model has seen, padding included. The number is the same for every layer."""
        return self.seen_tokens

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, whether it has states and no K/V.

        The list is never all True, because `generate` would then ignore the length.
        """
        kinds = super().is_linear
        return kinds if not all(kinds) else [False] * len(kinds)

    def detach(self) -> None:
        """Detach the stored tensors, so that no gradient of later tokens flows through them."""
        for layer in self.layers:
            for name in ("keys", "values", "conv_states", "recurrent_states"):
                if hasattr(layer, name):
                    setattr(layer, name, _detached(getattr(layer, name)))

    def reset(self) -> None:
        """Empty the cache."""
        self.layers = [type(layer)() for layer in self.layers]  # older transformers' `reset` keeps the length of K/V
        self.seen_tokens = 0
