"""The kinds of donor whose layers can be grafted. A new kind is an entry in `KINDS`; it needs no other code.

A grafted layer is transformers' own layer of that kind. Importing this file imports neither torch nor transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# The settings that a layer's computation depends on, with defaults. The names are those in transformers' configs.
_COMMON: dict[str, Any] = {
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "max_position_embeddings": 2048,
}
REQUIRED = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rope_parameters")
# If a model has several donors, they may differ in these settings only. Shapes, caches and masks depend on
# the other settings.
OF_EACH_DONOR = ("rms_norm_eps", "rope_parameters", "max_position_embeddings")
# Qwen's sliding windows: `layer_types` says which layers have a window.
_WINDOWS: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}


@dataclass(frozen=True)
class DonorKind:
    """One kind of donor.

    Attributes:
        model_type: as in config.json. The folder in `transformers.models` has the same name.
        classes: the beginning of the class names in that folder, such as "Qwen3" in `Qwen3DecoderLayer`.
        fields: the settings that a layer's computation depends on, with defaults.
        qkv_biases: whether queries, keys and values always have biases. (`attention_bias` adds one to the output too.)
        qk_norms: whether the queries and keys of each head go through an RMSNorm.
    """

    model_type: str
    classes: str
    fields: dict[str, Any] = field(default_factory=dict)
    qkv_biases: bool = False
    qk_norms: bool = False

    def transformers_class(self, name: str) -> Any:
        """transformers' class of this kind whose name ends in `name`: "Config", "DecoderLayer", "ForCausalLM", ..."""
        file = "configuration" if name == "Config" else "modeling"
        module = import_module(f"transformers.models.{self.model_type}.{file}_{self.model_type}")
        return getattr(module, self.classes + name)

    def settings(self, config: Any) -> dict[str, Any]:
        """The values of `fields` in a donor's config. A Llamba's config keeps them as `llama_cfg`."""
        found = {name: getattr(config, name, default) for name, default in self.fields.items()}
        # Qwen2's config has no head_dim.
        found["head_dim"] = found["head_dim"] or config.hidden_size // config.num_attention_heads
        return found


KINDS = {
    kind.model_type: kind
    for kind in (
        DonorKind("llama", "Llama", _COMMON | {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}),
        DonorKind("mistral", "Mistral", _COMMON | {"attention_dropout": 0.0, "sliding_window": None}),
        DonorKind("qwen2", "Qwen2", _COMMON | {"attention_dropout": 0.0} | _WINDOWS, qkv_biases=True),
        DonorKind(
            "qwen3", "Qwen3", _COMMON | {"attention_bias": False, "attention_dropout": 0.0} | _WINDOWS, qk_norms=True
        ),
    )
}


def mask_kinds(settings: Mapping[str, Any], layers: int) -> list[str]:
    """For each layer of a donor with these `settings`, the mask it needs: "full_attention" or "sliding_attention"."""
    kind = "full_attention" if settings.get("sliding_window") is None else "sliding_attention"
    return settings.get("layer_types") or [kind] * layers


def kv_heads(heads: Sequence[int], group_size: int) -> list[int]:
    """The key/value heads that query heads use, sorted. `group_size` query heads share one key/value head."""
    return sorted({head // group_size for head in heads})


def picked_heads(
    heads: Sequence[int], num_heads: int, num_kv_heads: int, head_dim: int, kind: DonorKind = KINDS["llama"]
) -> dict[str, tuple[int, list[int]] | None]:
    """Which entries of a donor's layer, parameter by parameter, become a `HeadAttention` with these heads.

    Returns:
        By parameter name (the donor's, without `self_attn.`): (dimension, indices to pick), or None to pick everything.
    """

    def numbers(picked: Sequence[int]) -> list[int]:
        return [head * head_dim + offset for head in picked for offset in range(head_dim)]

    queries, groups = numbers(heads), numbers(kv_heads(heads, num_heads // num_kv_heads))
    rows = {"q_proj": queries, "k_proj": groups, "v_proj": groups}
    norms = ("q_norm", "k_norm") if kind.qk_norms else ()
    return {
        "input_layernorm.weight": None,
        **{f"{name}.weight": (0, picked) for name, picked in rows.items()},
        **{f"{name}.bias": (0, picked) for name, picked in rows.items() if kind.qkv_biases},
        **{f"{name}.weight": (0, list(range(head_dim))) for name in norms},
        "o_proj.weight": (1, queries),
    }
