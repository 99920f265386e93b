"""What a graft will be, checked before it is put in place, and the model it makes.

In: `GraftParts`, or the names they are found by. Out: a `GraftPlan`: the parts, and the model that they are made into.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model_preparation.checkpoint.graft_parts import GraftParts, find_parts
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.model_configs import heads_of, layer_shapes, read_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, has_tokenizer, resolve, tokenizer_name
from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LLAMA_DEFAULTS, LlambaConfig


@dataclass(frozen=True)
class GraftPlan(GraftParts):
    """A graft that can be done: all checks have passed.

    Attributes:
        config: the grafted model's.
        casts: what changes its dtype on the way, in words; empty if nothing does.
        tokenizer: the folder the tokenizer is taken from.
        tokenizer_of: in words, whose it is.
        tokenizer_source: its `Source.as_dict()`, if it is neither the base's nor the donor's.
    """

    config: LlambaConfig
    casts: list[str]
    tokenizer: Path
    tokenizer_of: str
    tokenizer_source: dict[str, str | None] | None

    def describe(self) -> list[str]:
        """The plan in lines to print."""
        (heads, size), (kept_heads, kept_size) = heads_of(self.donor.config), heads_of(self.config)
        return [
            f"base       {self.base.id if self.base.hub == 'embedded' else self.base.folder}",
            f"donor      {self.donor.metadata['source']['id']} (layers in {self.donor.folder})",
            *(f"layer {index:>3}  <- {self.donor.path(index)}" for index in self.layers),
            f"kept       {self.config.n_layer - len(self.layers)} of {self.config.n_layer} layers, and all around them",
            f"heads      {heads} of {size} in the layers taken, {kept_heads} of {kept_size} in those kept",
            f"dtype      {self.dtype.name}" + "".join(f"; {cast}" for cast in self.casts),
            f"tokenizer  {self.tokenizer_of} ({self.tokenizer})",
            f"weights    {decimal(self.weight_bytes)} ({self.parameters:,} parameters)",
        ]


def plan(
    base_name: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path | LayerStore,
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | str | None = None,
    sources: Mapping[str, str] | None = None,
) -> GraftPlan:
    """`find_parts`, then `check`; their arguments."""
    parts = find_parts(base_name, layers, llama_layers_dir, dtype=dtype, sources=sources)
    return check(parts, tokenizer=tokenizer, sources=sources)


def check(
    parts: GraftParts,
    *,
    tokenizer: str | None = None,
    sources: Mapping[str, str] | None = None,
) -> GraftPlan:
    """Check that the donor's layers fit the base, file by file, and say what will be done.

    Args:
        parts: from `find_parts`.
        tokenizer: name, folder or hub id to take it from; by default the base's own, else the donor's.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: for anything that would make the graft fail or be wrong.
    """
    base, donor, layers = parts.base, parts.donor, parts.layers
    base_config = read_config(base.folder)
    assert isinstance(base_config, LlambaConfig)  # by its model_type
    if base_config.llama_layers:
        raise SurgeryError(f"{base.folder} has grafted layers already. Start from a base without any.")
    _check_donor(base_config, donor)
    donor.check(layers)

    config = grafted_config(base_config, donor, layers)
    casts = _check_tensors(parts, config)
    tokenizer_folder, tokenizer_of, other = _find_tokenizer(tokenizer, parts.base_name, base, donor, sources)
    config.dtype = parts.dtype.torch
    return GraftPlan(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(GraftParts)},
        config=config,
        casts=casts,
        tokenizer=tokenizer_folder,
        tokenizer_of=tokenizer_of,
        tokenizer_source=None if other is None else other.as_dict(),
    )


def grafted_config(base: LlambaConfig, donor: LayerStore, layers: Sequence[int]) -> LlambaConfig:
    """The base's config with `layers` marked as the donor's, and the settings of the donor's attention."""
    fields = base.file_fields()
    fields.pop("_name_or_path", None)  # a path of this machine
    fields.pop("auto_map", None)  # names files beside the base's config.json
    fields["architectures"] = [LlambaForCausalLM.__name__]
    fields["llama_layers"] = list(layers)
    fields["llama_cfg"] = {name: getattr(donor.config, name) for name in LLAMA_DEFAULTS}
    fields["max_position_embeddings"] = donor.config.max_position_embeddings
    fields["use_cache"] = False  # plain forward passes need none; `generate` asks for it by itself
    with refusing_impossible_models():
        return LlambaConfig.from_dict(fields)


def empty_model(config: LlambaConfig) -> LlambaForCausalLM:
    """The model without memory for its parameters (meta device); its few buffers are real, on the CPU."""
    # The device is of this thread only, unlike accelerate's init_empty_weights.
    with torch.device("meta"), refusing_impossible_models():
        model = LlambaForCausalLM(config)
    if config.llama_layers:
        model.backbone.rotary_emb = LlamaRotaryEmbedding(config.llama_config())
    model.tie_weights()
    return model.eval()


def _check_donor(base: LlambaConfig, donor: LayerStore) -> None:
    """Compare the two configs: kind, depth, width, vocabulary. Heads and MLPs a grafted layer brings itself."""
    config = donor.config
    if config.model_type != "llama":
        raise SurgeryError(f"{donor.folder} holds layers of a {config.model_type} model. The donor must be a Llama.")
    numbers = [
        ("layers", config.num_hidden_layers, (base.n_layer,)),
        ("width (hidden_size)", config.hidden_size, (base.d_model,)),
        ("vocabulary size", config.vocab_size, (base.vocab_size, base.padded_vocab_size)),
    ]
    for what, found, wanted in numbers:
        if found not in wanted:
            raise SurgeryError(
                f"The donor's {what} is {found}, the base's is {wanted[0]}. "
                f"Extract the layers of the base's own donor into {donor.folder}."
            )


def _check_tensors(parts: GraftParts, config: LlambaConfig) -> list[str]:
    """Compare every tensor's shape with what the grafted config asks for; returns the casts, in words."""
    files, donor = parts.files, parts.donor
    donor_dtypes: set[DType] = set()
    wanted_of_donor = layer_shapes(donor.config)
    for index in parts.layers:
        ranges = donor.ranges(index)
        donor_dtypes |= {place.dtype for place in ranges.values()}
        found = {name: place.shape for name, place in ranges.items()}
        if found != wanted_of_donor:
            odd = sorted(
                name for name in found.keys() | wanted_of_donor if found.get(name) != wanted_of_donor.get(name)
            )
            raise SurgeryError(
                f"{donor.path(index)} does not hold the layer its metadata.json describes ({', '.join(odd[:3])}). "
                "Extract the layers again."
            )
    base_dtypes: set[DType] = set()
    replaced = tuple(f"backbone.layers.{index}." for index in parts.layers)
    parameters = dict(empty_model(config).named_parameters())  # tied ones once
    for name in parts.tensors:
        if name not in parameters:
            raise SurgeryError(f"{files.folder} holds {name}, for which a Llamba of its config.json has no place.")
    for name, parameter in parameters.items():
        if name.startswith(replaced):
            continue
        files.require(name, parameter.shape)
        base_dtypes.add(files.ranges[name].dtype)
    casts = []
    for whose, found_dtypes in (("the base", base_dtypes), ("the donor's layers", donor_dtypes)):
        names = ", ".join(sorted(other.name for other in found_dtypes - {parts.dtype}))
        if names:
            casts.append(f"{whose} cast from {names}")
    return casts


def _find_tokenizer(
    asked: str | None, base_name: str, base: Source, donor: LayerStore, sources: Mapping[str, str] | None
) -> tuple[Path, str, Source | None]:
    """(folder, whose it is in words, where it comes from if that is neither the base nor the donor)."""
    if asked is None and has_tokenizer(base.folder):
        return base.folder, "the base's", None
    if asked is None and has_tokenizer(donor.tokenizer):
        return donor.tokenizer, "the donor's", None
    if name := asked or tokenizer_name(base_name):
        source = resolve(name, need="tokenizer", overrides=sources)
        return source.folder, "as asked" if asked else name, source
    raise SurgeryError(
        f"Neither {base.folder} nor {donor.folder} has a tokenizer. Name one with --tokenizer NAME|PATH."
    )
