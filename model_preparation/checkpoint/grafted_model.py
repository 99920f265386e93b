"""A grafted model without its weights: its config, made from the configs of base and donor, and the empty model.

torch and transformers take long to import, so they are imported where they are used.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from model_preparation.checkpoint.layer_store import LayerStore, check_heads
from model_preparation.errors import SurgeryError
from model_preparation.llamba.donor_kinds import KINDS, OF_EACH_DONOR

if TYPE_CHECKING:
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM


def grafted_config(
    base: "LlambaConfig",
    donor: LayerStore | None,
    layers: Sequence[int],
    heads: Mapping[int, Sequence[int]] = MappingProxyType({}),
    keep_mixer_heads: bool = False,
    *,
    kept: Collection[int] = (),
) -> "LlambaConfig":
    """The base's config with the settings of the donor's layers, and with the grafted layers and heads.

    The layers in `kept` are already grafted in `base`, and keep their settings.

    Raises:
        SurgeryError: if donors differ in a setting that all grafted layers share, if single heads of the
            donor cannot be grafted, or if no model can be made from the new config.
    """
    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

    fields = base.file_fields()
    fields.pop("_name_or_path", None)  # a path of this machine
    fields.pop("auto_map", None)  # names files in the base's folder
    fields["architectures"] = [LlambaForCausalLM.__name__]
    # Some copies of a base's config lack this field. It is always set, so all copies give the same bytes of model.pt.
    fields["label2id"] = {label: int(index) for index, label in fields.get("id2label", {}).items()}
    fields["llama_layers"] = list(layers)
    fields["llama_heads"] = {str(index): list(layer_heads) for index, layer_heads in heads.items()}
    fields["keep_mixer_heads"] = keep_mixer_heads and bool(heads)
    if donor is not None and not kept:
        fields["donor_type"] = donor.config.model_type
        fields["llama_cfg"] = KINDS[donor.config.model_type].settings(donor.config)
        fields["max_position_embeddings"] = donor.config.max_position_embeddings
    others = fields.get("other_llama_cfgs", {})
    fields["other_llama_cfgs"] = {index: others[index] for index in others if int(index) in kept}
    for index in sorted({*layers, *heads} - {*kept}):
        assert donor is not None  # the donor gives every layer that is not kept
        config = donor.config_of(index)
        own = KINDS[config.model_type].settings(config)
        if differing := {name: value for name, value in own.items() if value != fields["llama_cfg"].get(name)}:
            if config.model_type != (first := fields.get("donor_type", "llama")):
                raise SurgeryError(
                    f"The donor of layer {index} is a {config.model_type} model, but the first donor is a {first} "
                    f"model, with another {', '.join(differing)}. Give another donor."
                )
            if not differing.keys() <= {*OF_EACH_DONOR}:
                raise SurgeryError(
                    f"The donor of layer {index} has other settings than the first donor: {', '.join(differing)}. "
                    f"Layers of one model may differ in {', '.join(OF_EACH_DONOR)} only: give another donor."
                )
            fields["other_llama_cfgs"][str(index)] = differing
    for index, layer_heads in heads.items():
        check_heads(index, layer_heads, fields["llama_cfg"]["num_attention_heads"])
    if heads and fields["llama_cfg"].get("attention_bias"):
        raise SurgeryError(
            "The donor's attention has a bias on its output (attention_bias), which belongs to no head. Graft whole "
            "layers with --layers, or give another donor."
        )
    fields["use_cache"] = False  # a plain forward pass needs no cache; `generate` asks for one itself
    with refusing_impossible_models():
        return LlambaConfig.from_dict(fields)


def empty_model(config: "LlambaConfig") -> "LlambaForCausalLM":
    """The model with parameters on the meta device, which take no memory. Its few buffers are real, on the CPU."""
    import torch

    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
    from model_preparation.llamba import LlambaForCausalLM

    # This sets the device for this thread only, unlike accelerate's init_empty_weights.
    with torch.device("meta"), refusing_impossible_models():
        model = LlambaForCausalLM(config)
    model.backbone.make_rotary_embeddings()
    model.tie_weights()
    return model.eval()
