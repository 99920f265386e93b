"""Grafted heads: the donor's attention with some of its query heads only. A Mamba block adds it to its mixer's output.

The parameters are only the rows of q, k and v and the columns of o that these heads need. So cost and cache grow with
the number of heads. A few heads do most of the recall: arXiv 2504.18574, arXiv 2602.11374.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from .cache_llamba import LlambaCache
from .donor_kinds import KINDS, kv_heads, mask_kinds


class HeadAttention(nn.Module):
    """out = sum over the heads h of softmax(q_h k_g(h)^T / sqrt(head_dim)) v_g(h) o_h^T, after the donor's input norm.

    g(h) is the K/V head that h uses. Biases, norms of queries and keys, and the sliding window are as in the donor.

    Args:
        config: the donor's config.
        heads: the query heads, sorted.
        layer_idx: the layer's index.
    """

    def __init__(self, config: PreTrainedConfig, heads: Sequence[int], layer_idx: int):
        super().__init__()
        kind = KINDS[config.model_type]
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        settings = kind.settings(config)
        has_window = mask_kinds(settings, config.num_hidden_layers)[layer_idx] == "sliding_attention"
        self.sliding_window = settings["sliding_window"] if has_window else None
        group_size = config.num_attention_heads // config.num_key_value_heads
        groups = kv_heads(heads, group_size)
        self._pad_groups([groups.index(head // group_size) for head in heads])
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, len(heads) * self.head_dim, bias=kind.qkv_biases)
        self.k_proj = nn.Linear(config.hidden_size, len(groups) * self.head_dim, bias=kind.qkv_biases)
        self.v_proj = nn.Linear(config.hidden_size, len(groups) * self.head_dim, bias=kind.qkv_biases)
        if kind.qk_norms:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(len(heads) * self.head_dim, config.hidden_size, bias=False)

    def _pad_groups(self, kv_place: Sequence[int]) -> None:
        """Plan which queries to repeat, so that all K/V heads have equally many. Copying K/V would cost more.

        Args:
            kv_place: for each query head, its K/V head as an index into the K/V heads of this module; sorted.
        """
        places = [[at for at, own in enumerate(kv_place) if own == group] for group in range(kv_place[-1] + 1)]
        self.num_key_value_groups = max(map(len, places))
        padded = [at for own in places for at in own + own[-1:] * (self.num_key_value_groups - len(own))]
        self.query_place = padded if len(padded) > len(kv_place) else []
        self.out_place = [padded.index(at) for at in range(len(kv_place))]

    def __setstate__(self, state: dict[str, Any]) -> None:
        kv_place = state.pop("kv_place", None)
        super().__setstate__(state)
        if kv_place is not None:  # a model.pt of version 0.4
            heads = range(self.q_proj.out_features // self.head_dim)
            self._pad_groups(kv_place or [head // self.num_key_value_groups for head in heads])
            self.sliding_window = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        cache: LlambaCache | None = None,
        **kwargs,
    ) -> Tensor:
        """
        Args:
            hidden_states: (batch, length, d_model), before any norm.
            attention_mask: the mask that transformers makes for the attention implementation in use.
            position_embeddings: (cos, sin), each (batch, length, head_dim).
            cache: the cache of the earlier tokens; updated in place.
            kwargs: further arguments for the attention implementation.

        Returns:
            (batch, length, d_model), to be added to the residual.
        """
        normed = self.input_layernorm(hidden_states)
        shape = (*normed.shape[:-1], -1, self.head_dim)
        query, key, value = (project(normed).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.query_place:
            query = query[:, self.query_place]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        out, _ = attend(self, query, key, value, attention_mask, sliding_window=self.sliding_window, **kwargs)
        if self.query_place:
            out = out[:, :, self.out_place]
        return self.o_proj(out.reshape(*normed.shape[:-1], -1))
