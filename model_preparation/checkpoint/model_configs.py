"""Configs of bases and donors, and the names and shapes of a layer's tensors.

transformers' models take long to import, so they are imported where they are used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.tensors.quantisation import GIVE_UNQUANTISED, method_in_config
from model_preparation.io.untrusted.untrusted_files import check_fields, check_sizes, read_json
from model_preparation.llamba.donor_kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from model_preparation.llamba.configuration_llamba import LlambaConfig

Shape = tuple[int, ...]

_DEPTH_NAMES = ("n_layer", "num_hidden_layers")  # Cartesia's name, for a Llamba; transformers' name


def type_and_depth(folder: Path) -> tuple[str, int]:
    """(model_type, number of layers) of a model folder. transformers is imported only if the number is unclear.

    Raises:
        SurgeryError: as `read_config` does.
    """
    fields = _config_fields(folder)
    depths = {fields[name] for name in _DEPTH_NAMES if type(fields.get(name)) is int}
    if len(depths) == 1:
        return fields["model_type"], depths.pop()
    return fields["model_type"], getattr(read_config(folder), "num_hidden_layers", 0)


def ties_embeddings(folder: Path) -> bool:
    """Whether the Llamba in a model folder uses its embedding as its head."""
    fields = _config_fields(folder)
    return bool(fields.get("tie_embeddings", fields.get("tie_word_embeddings", False)))


def read_config(folder: Path) -> "PreTrainedConfig":
    """The config of a model folder.

    Raises:
        SurgeryError: if neither transformers nor this package can read config.json. The error gives the reason.
    """
    from model_preparation.io.untrusted.untrusted_config import config_from

    fields = _config_fields(folder)
    try:
        return config_from(fields, _kind(fields["model_type"]))
    except ValueError as error:
        raise SurgeryError(f"{folder / 'config.json'} cannot be used: {one_line(error)}.") from error


def config_from_dict(fields: dict[str, Any]) -> "PreTrainedConfig":
    """The config with these fields; raises ValueError if they are damaged, or describe neither donor nor Llamba."""
    from model_preparation.io.untrusted.untrusted_config import config_from

    check_fields(fields, {"model_type": str})
    if fields["model_type"] not in (*KINDS, "llamba"):
        raise ValueError(f"model_type {fields['model_type']!r:.80} is none of {', '.join(KINDS)}, llamba")
    return config_from(fields, _kind(fields["model_type"]))


def check_kind(model_type: str, sentence_start: str) -> None:
    """Raise SurgeryError unless a donor can have this type. The error begins with `sentence_start`, such as "X is"."""
    if model_type not in KINDS:
        *others, last = KINDS
        raise SurgeryError(f"{sentence_start} a {model_type} model, and a donor must be {', '.join(others)} or {last}.")


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The fields of a model folder's generation_config.json; None if the file is missing."""
    path = folder / "generation_config.json"
    try:
        fields = read_json(path) if path.exists() else None
        check_sizes(fields)
        return fields
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be used: {one_line(error)}.") from error


def heads_of(config: "PreTrainedConfig") -> tuple[int, int]:
    """(number of heads, head size) of a donor's attention, or of the values in a Llamba's mixer."""
    if config.model_type == "llamba":
        num_heads = config.ssm_cfg["n_v_heads"]
        return num_heads, config.d_inner // num_heads
    return config.num_attention_heads, KINDS[config.model_type].settings(config)["head_dim"]


def layer_shapes(config: "PreTrainedConfig", index: int = 0) -> dict[str, Shape]:
    """Names (relative to the layer) and shapes of a layer's parameters. No memory is allocated for them.

    Args:
        config: the config of a donor or a Llamba.
        index: the layer's index. For a donor, any index gives the same.
    """
    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models

    is_llamba = config.model_type == "llamba"
    with refusing_impossible_models():
        if is_llamba and index not in config.llama_layers and str(index) not in config.llama_heads:
            return _mamba_shapes(config)
        import torch

        donor = config.llama_config(index) if is_llamba else config
        with torch.device("meta"):
            if is_llamba and index not in config.llama_layers:
                from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer

                layer = LlambaDecoderLayer(config, index, donor)
            else:
                layer = KINDS[donor.model_type].transformers_class("DecoderLayer")(donor, 0)
        return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def _mamba_shapes(config: "LlambaConfig") -> dict[str, Shape]:
    """Names and shapes in a `LlambaDecoderLayer` (llamba/modeling_llamba.py and mixer.py), without importing it."""
    ssm, mlp = config.ssm_cfg, config.mlp_cfg
    width, d_inner, inner = config.d_model, config.d_inner, mlp["intermediate_size"]
    conv_dim = d_inner + 2 * ssm["n_qk_heads"] * ssm["d_state"]
    projections = {
        "mixer.in_proj": (conv_dim + d_inner + ssm["n_v_heads"], width),
        "mixer.out_proj": (width, d_inner),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, Shape] = {
        "mixer.D": (ssm["n_v_heads"],),
        "mixer.conv1d.weight": (conv_dim, 1, ssm["d_conv"]),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    for name, shape in projections.items():
        shapes[f"{name}.weight"] = shape
        if (mlp if name.startswith("mlp.") else ssm)["bias"]:
            shapes[f"{name}.bias"] = shape[:1]
    if ssm["conv_bias"]:
        shapes["mixer.conv1d.bias"] = (conv_dim,)
    if not ssm["bias"]:  # in_proj has no bias, so z has its own
        shapes["mixer.z_bias"] = (d_inner,)
    return shapes


def _config_fields(folder: Path) -> dict[str, Any]:
    """The fields of config.json; for a multimodal model, the fields of its text part."""
    path = folder / "config.json"
    try:
        fields = read_json(path)
        if method := method_in_config(fields):
            raise SurgeryError(f"{path} says that this model is quantised by {method}. {GIVE_UNQUANTISED}")
        text = fields.get("text_config")
        if isinstance(text, dict):
            shared = {name: fields[name] for name in ("tie_word_embeddings",) if name in fields}
            fields = shared | text
        check_fields(fields, {"model_type": str})
        check_sizes(fields)
        return fields
    except (ValueError, FileNotFoundError) as error:
        raise SurgeryError(f"{path} cannot be used: {one_line(error)}. Copy or download it again.") from error


def _kind(model_type: str) -> "type[PreTrainedConfig]":
    """The config class of a model type; raises ValueError if neither transformers nor we know the type."""
    if model_type == "llamba":
        from model_preparation.llamba.configuration_llamba import LlambaConfig

        return LlambaConfig
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r:.80} is unknown")
    return CONFIG_MAPPING[model_type]
