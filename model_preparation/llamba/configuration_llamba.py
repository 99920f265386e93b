"""The config of a Llamba: sizes, mixer, MLP, and which layers come from a donor.

"Upstream" is Cartesia's own code of Llamba. The config reads upstream's config.json (`d_model`, `n_layer`, `ssm_cfg`,
`mlp_cfg`, ...), and also accepts Hugging Face's names of the same fields, such as `hidden_size`.
Source of upstream's fields: cartesia-ai/edge, cartesia-pytorch/cartesia_pytorch/Llamba/configuration_llamba.py.
"""

from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from .transformers_versions import TESTED  # noqa: F401  first: it reports a transformers that is too old

# isort: split
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .donor_kinds import KINDS, OF_EACH_DONOR, REQUIRED, mask_kinds

# At run time, only the function that makes a LlamaConfig imports it, because the import takes a second.
if TYPE_CHECKING:
    from transformers import LlamaConfig

MLP_DEFAULTS: dict[str, Any] = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}

SSM_DEFAULTS: dict[str, Any] = {
    "d_state": 64,
    "n_v_heads": 32,
    "n_qk_heads": 32,
    "d_conv": 4,
    "expand": 1,
    "chunk_size": 128,
    "activation": "identity",
    "bias": False,
    "conv_bias": True,
}

# Fields that other libraries read. Their values follow from `llama_cfg`, or from `ssm_cfg` and `mlp_cfg`.
DERIVED = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")

ACTIVATIONS = ("identity", "silu", "swish")


@strict
class LlambaConfig(PreTrainedConfig):
    r"""Configuration of a [`LlambaForCausalLM`].

    Args:
        vocab_size: the number of different tokens. The embedding and the head have this many rows, rounded up to a
            multiple of `pad_vocab_size_multiple`. The model never returns logits of the added rows.
        d_model: width of the hidden states.
        n_layer: number of layers, grafted ones included.
        tie_embeddings: whether the head uses the embedding's weight.
        pad_vocab_size_multiple: see `vocab_size`.
        lm_head_bias: whether an untied head has a bias.
        resid_dropout: not used, neither here nor upstream; kept so that upstream's files round-trip.
        norm_epsilon: epsilon of the final norm. In Mamba blocks, the norms' epsilon is always 1e-5, as upstream.
        mlp_cfg: `intermediate_size`, `bias`, `act_fn` of the Mamba blocks' MLPs; fields left out take the defaults.
        ssm_cfg: `d_state`, `n_v_heads`, `n_qk_heads`, `d_conv`, `expand`, `chunk_size`, `activation` ("identity" or
            "silu"), `bias`, `conv_bias` of the mixers; fields left out take the defaults.
        max_position_embeddings: the largest length of a sequence, in tokens. It is the donor's limit. Without grafts,
            there is no limit.
        llama_layers: indices of the layers that come from the donor, sorted, without repeats.
        llama_cfg: the fields of the donor's config that grafted layers and heads need (`KINDS[donor_type].fields`).
        other_llama_cfgs: for each layer whose donor has other values than `llama_cfg`, the fields that differ (some of
            `OF_EACH_DONOR`). Keys are the layers' indices as text. Files have this field only if it is not empty.
        donor_type: the donor's kind, one of `KINDS`. Files have this field only if it is not "llama".
        llama_heads: for each layer with grafted heads, the donor's query heads that are added to its mixer, sorted.
            Keys are the layers' indices as text. Files have this field only if it is not empty.
        keep_mixer_heads: whether the mixer keeps the channels that grafted heads would replace (`replaced_channels`).
            By default, these channels are set to zero before `out_proj`. Files have this field only if it is true.

    Raises:
        ValueError: for a field of `mlp_cfg`, `ssm_cfg` or `llama_cfg` that does not exist, an unknown `donor_type`, or
            a field of `DERIVED` whose value contradicts the other fields. The message names the field.
        StrictDataclassClassValidationError: for other values with which no model can be made, such as a layer index
            that is out of range. The message names the field.
    """

    model_type = "llamba"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
        "rms_norm_eps": "norm_epsilon",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 128256
    d_model: int = 4096
    n_layer: int = 32
    tie_embeddings: bool = False
    pad_vocab_size_multiple: int = 8
    lm_head_bias: bool = False
    resid_dropout: float | int = 0.0
    norm_epsilon: float = 1e-5
    mlp_cfg: Any = None  # a dict, like the other fields of type Any; __post_init__ fills in defaults
    ssm_cfg: Any = None
    llama_layers: list[int] = field(default_factory=list)
    llama_cfg: Any = None
    other_llama_cfgs: Any = None
    donor_type: str = "llama"
    llama_heads: Any = None
    keep_mixer_heads: bool = False
    max_position_embeddings: int = 1_000_000_000
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.mlp_cfg = _with_defaults("mlp_cfg", self.mlp_cfg, MLP_DEFAULTS)
        self.ssm_cfg = _with_defaults("ssm_cfg", self.ssm_cfg, SSM_DEFAULTS)
        self.llama_heads = self.llama_heads or {}
        self.other_llama_cfgs = self.other_llama_cfgs or {}
        if self.donor_type not in KINDS:
            raise ValueError(f"donor_type is {self.donor_type!r:.80}; this version knows {', '.join(KINDS)}")
        if self.has_attention:
            self.llama_cfg = _with_defaults("llama_cfg", self.llama_cfg, KINDS[self.donor_type].fields)
        derived = {name: kwargs.pop(name) for name in DERIVED if name in kwargs}
        super().__post_init__(**kwargs)  # also sets the fields that were given by Hugging Face's names
        for name, value in derived.items():
            if value != getattr(self, name):
                raise ValueError(f"{name} is {value}, but the other fields make it {getattr(self, name)}; leave it out")

    @property
    def padded_vocab_size(self) -> int:
        """How many rows the embedding and the head have."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def d_inner(self) -> int:
        """Width of a mixer's values, all its `n_v_heads` together."""
        return self.ssm_cfg["expand"] * self.d_model

    @property
    def has_attention(self) -> bool:
        """Whether any layer or head is grafted."""
        return bool(self.llama_layers or self.llama_heads)

    @property
    def num_attention_heads(self) -> int:
        """How many query heads the donor's layers have; if nothing is grafted, how many value heads the mixers have."""
        return self.llama_cfg["num_attention_heads"] if self.has_attention else self.ssm_cfg["n_v_heads"]

    @property
    def num_key_value_heads(self) -> int:
        """How many key/value heads the donor's layers have; if nothing is grafted, how many heads of B a mixer has."""
        return self.llama_cfg["num_key_value_heads"] if self.has_attention else self.ssm_cfg["n_qk_heads"]

    @property
    def head_dim(self) -> int:
        """Width of one query head of the donor; if nothing is grafted, of one value head of a mixer."""
        return self.llama_cfg["head_dim"] if self.has_attention else self.d_inner // self.ssm_cfg["n_v_heads"]

    @property
    def intermediate_size(self) -> int:
        """Width of the MLPs in grafted layers; if no layer is grafted, of the MLPs in Mamba blocks."""
        return (self.llama_cfg if self.llama_layers else self.mlp_cfg)["intermediate_size"]

    @property
    def layer_types(self) -> list[str]:
        """For each layer, what transformers calls its kind: "linear_attention", "hybrid", or a grafted layer's mask."""
        kinds = ["hybrid" if str(index) in self.llama_heads else "linear_attention" for index in range(self.n_layer)]
        for index in self.llama_layers:
            if index < self.n_layer:
                kinds[index] = self.mask_of(index)
        return kinds

    def mask_of(self, layer: int) -> str:
        """The mask that a layer's attention needs: "full_attention" or "sliding_attention"."""
        masks = mask_kinds(self.llama_cfg, self.n_layer)
        return masks[layer] if layer < len(masks) else "full_attention"  # before validation, masks may be too few

    def heads_of_layer(self, layer: int) -> list[int]:
        """The donor's heads that are added to a layer's mixer."""
        return self.llama_heads.get(str(layer), [])

    def replaced_channels(self, layer: int) -> list[tuple[int, int]]:
        """(start, end) of the mixer's channels that each grafted head of a layer replaces.

        If the donor has n heads, its head i replaces part i of n equal parts of the mixer's channels.
        """
        heads = [] if self.keep_mixer_heads else self.heads_of_layer(layer)
        size = self.d_inner // self.num_attention_heads
        return [(head * size, (head + 1) * size) for head in heads]

    def to_dict(self) -> dict[str, Any]:
        """The fields of our files and the `DERIVED` ones, which some libraries read from this dict."""
        return {**self.file_fields(), **{name: getattr(self, name) for name in DERIVED}}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that `save_pretrained` writes, without the `DERIVED` ones."""
        return self._written({name: value for name, value in super().to_diff_dict().items() if name not in DERIVED})

    def file_fields(self) -> dict[str, Any]:
        """The fields that are in our files, without the `DERIVED` ones."""
        return self._written(super().to_dict())

    def _written(self, fields: dict[str, Any]) -> dict[str, Any]:
        """`fields` as files have them: without the newer fields of this class that have their default."""
        newer = {"other_llama_cfgs": {}, "donor_type": "llama", "llama_heads": {}, "keep_mixer_heads": False}
        return {name: value for name, value in fields.items() if name not in newer or value != newer[name]}

    def mlp_config(self) -> "LlamaConfig":
        """The config of the Mamba blocks' MLPs, which are transformers' LlamaMLP."""
        from transformers import LlamaConfig

        mlp = self.mlp_cfg
        return LlamaConfig(
            hidden_size=self.d_model,
            num_attention_heads=1,  # not used by an MLP, but it must divide hidden_size
            intermediate_size=mlp["intermediate_size"],
            mlp_bias=mlp["bias"],
            hidden_act=mlp["act_fn"],
        )

    def llama_config(self, layer: int | None = None) -> PreTrainedConfig:
        """The donor's config for a grafted layer; without `layer`, the first donor's. Needs a grafted layer or head."""
        kind = KINDS[self.donor_type].transformers_class("Config")
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.d_model, "num_hidden_layers": self.n_layer}
        return kind(**sizes, **self.llama_cfg | self.other_llama_cfgs.get(str(layer), {}))

    def validate_architecture(self):
        """Refuse values with which no model can be made or run. `@strict` calls this when it validates."""
        ssm = self.ssm_cfg
        if self.d_inner % ssm["n_v_heads"]:
            raise ValueError(f"ssm_cfg: n_v_heads {ssm['n_v_heads']} does not divide expand * d_model = {self.d_inner}")
        if ssm["n_v_heads"] % ssm["n_qk_heads"]:
            raise ValueError(f"ssm_cfg: n_qk_heads {ssm['n_qk_heads']} does not divide n_v_heads {ssm['n_v_heads']}")
        if ssm["activation"] not in ACTIVATIONS:
            raise ValueError(f"ssm_cfg: activation {ssm['activation']!r} is not one of {', '.join(ACTIVATIONS)}")
        layers = self.llama_layers
        if layers != sorted(set(layers)):
            raise ValueError(f"llama_layers {layers} must be sorted and without repeats")
        if layers and not 0 <= layers[0] <= layers[-1] < self.n_layer:
            raise ValueError(f"llama_layers {layers} must lie between 0 and {self.n_layer - 1}")
        if self.has_attention:
            missing = [field for field in REQUIRED if self.llama_cfg[field] is None]
            if missing:
                raise ValueError(f"llama_cfg lacks {', '.join(missing)}, which grafted layers need")
        self._check_heads()
        self._check_other_donors()
        if self.has_attention:
            masks = mask_kinds(self.llama_cfg, self.n_layer)
            if len(masks) != self.n_layer or not set(masks) <= {"full_attention", "sliding_attention"}:
                raise ValueError(
                    f"llama_cfg: layer_types needs {self.n_layer} entries, each full_attention or sliding_attention. "
                    f"It has {len(masks)} entries, with the values {', '.join(sorted(set(map(str, masks))))}"
                )
            window = self.llama_cfg.get("sliding_window")
            if "sliding_attention" in masks and not (isinstance(window, int) and window > 0):
                raise ValueError(f"llama_cfg: sliding_window is {window!r}, but sliding_attention needs a token count")

    def _check_other_donors(self) -> None:
        """Part of `validate_architecture`."""
        others = self.other_llama_cfgs
        grafted = [*map(str, self.llama_layers), *self.llama_heads]
        if not isinstance(others, dict) or not others.keys() <= {*grafted}:
            raise ValueError(
                f"other_llama_cfgs: each key must be a grafted layer ({', '.join(grafted)}): {others!r:.80}"
            )
        for layer, fields in others.items():
            if not isinstance(fields, dict) or not fields.keys() <= {*OF_EACH_DONOR}:
                raise ValueError(f"other_llama_cfgs: layer {layer} may have {', '.join(OF_EACH_DONOR)} only")

    def _check_heads(self) -> None:
        """Part of `validate_architecture`: the grafted heads exist, in layers that are Mamba blocks."""
        if not isinstance(self.llama_heads, dict):
            raise ValueError(f'llama_heads must be like {{"13": [16, 17]}}, not {self.llama_heads!r}')
        total = (self.llama_cfg or {}).get("num_attention_heads") or 0
        for layer, heads in self.llama_heads.items():
            if not str(layer).isdecimal() or not int(layer) < self.n_layer or int(layer) in self.llama_layers:
                raise ValueError(f"llama_heads: {layer!r} is not the number of a Mamba block of this model")
            if not heads or heads != sorted(set(heads)) or not 0 <= heads[0] <= heads[-1] < total:
                raise ValueError(
                    f"llama_heads: heads {heads} of layer {layer} must be sorted, without repeats, below {total}"
                )
        if self.llama_heads and self.llama_cfg.get("attention_bias"):
            raise ValueError("llama_heads: the donor's o_proj has a bias, which belongs to no head. Graft whole layers")
        if self.llama_heads and not self.keep_mixer_heads and self.d_inner % total:
            raise ValueError(f"llama_heads: the donor's {total} heads do not divide the mixer's width {self.d_inner}")


def _with_defaults(name: str, given: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{name} must be a dict of {', '.join(defaults)}, not {given!r}")
    unknown = sorted(set(given or {}) - set(defaults))
    if unknown:
        raise ValueError(f"{name} has unknown fields {', '.join(unknown)}; known are {', '.join(defaults)}")
    return {**defaults, **(given or {})}
