"""How many bytes a cache takes: keys and values (K/V) of grafted layers and heads, and states of Mamba layers."""

import torch
from transformers import PreTrainedConfig

from .donor_kinds import kv_heads


def kv_bytes_per_token(config: PreTrainedConfig, layers: int, dtype: torch.dtype) -> int:
    """The bytes that each token adds to the cache: K/V of `layers` grafted layers, and of all grafted heads."""
    group_size = config.num_attention_heads // config.num_key_value_heads
    grafted = getattr(config, "llama_heads", {}).values()
    kept = layers * config.num_key_value_heads + sum(len(kv_heads(heads, group_size)) for heads in grafted)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # absent in Qwen2
    return 2 * kept * head_dim * dtype.itemsize


def cache_bytes(config: PreTrainedConfig, layers: int, tokens: int, dtype: torch.dtype) -> int:
    """The bytes of one sequence's cache after `tokens` tokens, if `layers` layers are grafted and the others Mamba."""
    size = tokens * kv_bytes_per_token(config, layers, dtype)
    if others := config.num_hidden_layers - layers:
        ssm = config.ssm_cfg
        inputs = ssm["d_conv"] * (config.d_inner + 2 * ssm["n_qk_heads"] * ssm["d_state"])
        state = config.d_inner * ssm["d_state"]
        size += others * (inputs * dtype.itemsize + state * max(dtype.itemsize, 4))  # the state is at least float32
    return size
