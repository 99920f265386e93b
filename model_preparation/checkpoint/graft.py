"""What a graft is made of, whether its parts fit together, and the empty model for its tensors.

`find_parts` needs neither torch nor transformers, so a build writes weights while those are imported. `check_parts`
needs both: it compares configs and shapes, finds the tokenizer, and returns a `GraftPlan`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from model_preparation.checkpoint.layer_store import LayerStore, check_range, sorted_layers
from model_preparation.checkpoint.model_configs import (
    heads_of,
    layer_shapes,
    read_config,
    ties_embeddings,
    type_and_depth,
)
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, donor_name, has_tokenizer, resolve, tokenizer_name
from model_preparation.io.tensors.dtypes import DType, float_dtype
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import StoredTensor
from model_preparation.llamba.donor_kinds import KINDS

if TYPE_CHECKING:
    import torch

    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM


@dataclass(frozen=True)
class GraftParts:
    """The parts of a graft.

    Attributes:
        base_name: what the user called the base.
        base: where it is.
        files: its weights.
        donor: the extracted layers.
        layers: the indices of the layers that are the donor's, sorted.
        dtype: of every parameter.
        heads: by layer, the donor's heads that are added to the base's mixer, sorted.
        keep_mixer_heads: whether the mixer's heads of the same place stay beside them.
    """

    base_name: str
    base: Source
    files: TensorFiles
    donor: LayerStore
    layers: list[int]
    dtype: DType
    heads: dict[int, list[int]]
    keep_mixer_heads: bool

    @property
    def donor_layers(self) -> list[int]:
        """The layers of the donor that tensors are taken from, sorted."""
        return sorted([*self.layers, *self.heads])

    @property
    def replaced(self) -> tuple[str, ...]:
        """What the names of the donor's tensors begin with, per layer."""
        return donor_prefixes(self.layers, self.heads)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where every parameter of the grafted model lies, by its name there. Layer 2 comes before layer 10.

        Raises:
            SurgeryError: if a layer's file is missing or damaged.
        """
        found: dict[str, StoredTensor] = {
            name: place for name, place in self.files.ranges.items() if not name.startswith(self.replaced)
        }
        if ties_embeddings(self.base.folder):
            found.pop("lm_head.weight", None)  # the embedding is the head
        for index in self.layers:
            found |= {f"backbone.layers.{index}.{name}": at for name, at in self.donor.ranges(index).items()}
        for index, heads in self.heads.items():
            taken = self.donor.head_ranges(index, heads)
            found |= {f"backbone.layers.{index}.attention.{name}": at for name, at in taken.items()}
        return {name: found[name] for name in sorted(found, key=_in_order)}

    @property
    def parameters(self) -> int:
        """Numbers in the model; tied ones are counted once."""
        return sum(place.numel for place in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Size of the weights, written once."""
        return self.parameters * self.dtype.itemsize

    @property
    def base_paths(self) -> list[Path]:
        """The files that determine the base: its config, its weights, their index."""
        return [self.base.folder / "config.json", *self.files.paths()]


@dataclass(frozen=True)
class GraftPlan(GraftParts):
    """A graft that passed all checks.

    Attributes:
        config: the grafted model's.
        casts: in words, which tensors change their dtype; empty if none does.
        tokenizer: the folder the tokenizer is taken from.
        tokenizer_of: in words, who the tokenizer comes from.
        tokenizer_source: its `Source.as_dict()`, if it comes neither from the base nor from the donor.
    """

    config: "LlambaConfig"
    casts: list[str]
    tokenizer: Path
    tokenizer_of: str
    tokenizer_source: dict[str, str | None] | None

    def describe(self) -> list[str]:
        """The plan in lines to print."""
        from model_preparation.llamba.cache_llamba import kv_bytes_per_token  # imports torch

        ours = kv_bytes_per_token(self.config, len(self.layers), self.dtype.torch)
        theirs = kv_bytes_per_token(self.donor.config, self.config.n_layer, self.dtype.torch)
        (heads, size), (kept_heads, kept_size) = heads_of(self.donor.config), heads_of(self.config)
        total = self.config.n_layer
        return [
            f"Base         {self.base.id if self.base.hub == 'embedded' else self.base.folder}",
            f"Donor        {self.donor.metadata['source']['id']} (layers in {self.donor.folder})",
            *(f"Layer {index:>3}    <- {self.donor.path(index)}" for index in self.layers),
            *(
                f"Layer {index:>3}    <- head{'s' * (len(of_layer) > 1)} {', '.join(map(str, of_layer))} of "
                f"{self.donor.path(index)}" + (", the mixer stays whole" if self.keep_mixer_heads else "")
                for index, of_layer in self.heads.items()
            ),
            f"Kept         {total - len(self.layers)} of {total} layers, and all around them",
            f"Heads        {heads} of width {size} in grafted layers, {kept_heads} of width {kept_size} in kept ones",
            f"K/V cache    {ours:,} bytes per token; the donor's has {theirs:,}",
            f"Dtype        {self.dtype.name}" + "".join(f"; {cast}" for cast in self.casts),
            f"Tokenizer    {self.tokenizer_of} ({self.tokenizer})",
            f"Weights      {decimal(self.weight_bytes)} ({self.parameters:,} parameters)",
        ]


def plan(
    base_name: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path | LayerStore,
    *,
    tokenizer: str | None = None,
    dtype: "torch.dtype | str | None" = None,
    sources: Mapping[str, str] | None = None,
    **of_heads: Any,
) -> GraftPlan:
    """`find_parts`, then `check_parts`; their arguments."""
    parts = find_parts(base_name, layers, llama_layers_dir, dtype=dtype, sources=sources, **of_heads)
    return check_parts(parts, tokenizer=tokenizer, sources=sources)


def find_parts(
    base_name: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path | LayerStore,
    *,
    dtype: "DType | torch.dtype | str | None" = None,
    sources: Mapping[str, str] | None = None,
    heads: Mapping[int, Sequence[int]] | None = None,
    keep_mixer_heads: bool = False,
) -> GraftParts:
    """Find base and donor.

    Args:
        base_name: a name, folder or hub id of a Llamba, as `sources.resolve` takes it.
        layers: indices, in any order, each once.
        llama_layers_dir: a folder written by `extract_layers`, or an open store.
        dtype: of the whole model; by default the base's.
        sources: targets by name, as `resolve(overrides=...)` takes them.
        heads: by layer, the donor's heads to add to the base's mixer.
        keep_mixer_heads: whether the mixer's heads of the same place stay beside them.

    Raises:
        SurgeryError: if base or donor is missing or cannot be read, the base is no Llamba, or a layer is out of range.
    """
    added = {index: sorted_layers(heads[index], "head") for index in sorted(heads)} if heads else {}
    layers = sorted_layers(layers) if not added or len(layers) else []
    if both := sorted(added.keys() & set(layers)):
        raise SurgeryError(
            f"Layer {both[0]} is named in --layers and in --heads. A whole layer has all heads: name it once."
        )
    wanted = float_dtype(dtype)
    donor = llama_layers_dir
    if not isinstance(donor, LayerStore):
        donor = LayerStore(donor, hint=donor_name(base_name, sources))
    base, total = find_base(base_name, sources)
    check_range([*layers, *added], total, str(base.folder))
    files = TensorFiles(base.folder)
    return GraftParts(base_name, base, files, donor, layers, wanted or files.dtype(), added, keep_mixer_heads)


def find_base(name: str, sources: Mapping[str, str] | None) -> tuple[Source, int]:
    """Where a base is, and how many layers it has; raises SurgeryError if it is missing or no Llamba."""
    base = resolve(name, overrides=sources)
    model_type, total = type_and_depth(base.folder)
    if model_type != "llamba":
        raise SurgeryError(f"{base.folder} is a {model_type} model. The base must be a Llamba.")
    return base, total


def check_parts(
    parts: GraftParts,
    *,
    tokenizer: str | None = None,
    sources: Mapping[str, str] | None = None,
) -> GraftPlan:
    """Check that the donor's layers fit the base, file by file.

    Args:
        parts: from `find_parts`.
        tokenizer: name, folder or hub id to take it from; by default the base's own, else the donor's.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: for anything that would make the graft fail or be wrong.
    """
    from model_preparation.llamba import LlambaConfig

    base_config = read_config(parts.base.folder)
    assert isinstance(base_config, LlambaConfig)  # by its model_type
    if base_config.has_attention:
        raise SurgeryError(f"{parts.base.folder} has grafted layers already. Start from a base without any.")
    _check_donor(base_config, parts.donor)
    parts.donor.check(parts.donor_layers)
    config = grafted_config(base_config, parts.donor, parts.layers, parts.heads, parts.keep_mixer_heads)
    casts = _check_tensors(parts, config)
    tokenizer_folder, tokenizer_of, other = _find_tokenizer(parts, tokenizer, sources)
    config.dtype = parts.dtype.torch
    return GraftPlan(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(GraftParts)},
        config=config,
        casts=casts,
        tokenizer=tokenizer_folder,
        tokenizer_of=tokenizer_of,
        tokenizer_source=None if other is None else other.as_dict(),
    )


def grafted_config(
    base: "LlambaConfig",
    donor: LayerStore,
    layers: Sequence[int],
    heads: Mapping[int, Sequence[int]],
    keep_mixer_heads: bool,
) -> "LlambaConfig":
    """The base's config with the settings of the donor's attention; it names the donor's layers and heads."""
    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

    fields = base.file_fields()
    fields.pop("_name_or_path", None)  # a path of this machine
    fields.pop("auto_map", None)  # names files in the base's folder
    fields["architectures"] = [LlambaForCausalLM.__name__]
    fields["llama_layers"] = list(layers)
    fields["llama_heads"] = {str(index): list(of_layer) for index, of_layer in heads.items()}
    fields["keep_mixer_heads"] = keep_mixer_heads and bool(heads)
    fields["donor_type"] = donor.config.model_type
    fields["llama_cfg"] = KINDS[donor.config.model_type].settings(donor.config)
    fields["max_position_embeddings"] = donor.config.max_position_embeddings
    fields["use_cache"] = False  # plain forward passes need none; `generate` asks for it by itself
    with refusing_impossible_models():
        return LlambaConfig.from_dict(fields)


def empty_model(config: "LlambaConfig") -> "LlambaForCausalLM":
    """The model without memory for its parameters (meta device); its few buffers are real, on the CPU."""
    import torch

    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
    from model_preparation.llamba import LlambaForCausalLM

    # The device is of this thread only, unlike accelerate's init_empty_weights.
    with torch.device("meta"), refusing_impossible_models():
        model = LlambaForCausalLM(config)
    if config.has_attention:
        model.backbone.rotary_emb = KINDS[config.donor_type].transformers_class("RotaryEmbedding")(
            config.llama_config()
        )
    model.tie_weights()
    return model.eval()


def _check_donor(base: "LlambaConfig", donor: LayerStore) -> None:
    """Compare kind, depth, width and vocabulary. A grafted layer brings its own heads and MLP."""
    donor.check_is_donor()
    config = donor.config
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


def _check_tensors(parts: GraftParts, config: "LlambaConfig") -> list[str]:
    """Compare every tensor's shape with what the grafted config asks for; returns the casts, in words."""
    files, donor = parts.files, parts.donor
    donor_dtypes: set[DType] = set()
    wanted = layer_shapes(donor.config)
    for index in parts.donor_layers:
        ranges = donor.ranges(index)
        donor_dtypes |= {place.dtype for place in ranges.values()}
        found = {name: place.shape for name, place in ranges.items()}
        if odd := sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name)):
            raise SurgeryError(
                f"{donor.path(index)} does not hold the layer its metadata.json describes ({', '.join(odd[:3])}). "
                "Extract the layers again."
            )
    base_dtypes: set[DType] = set()
    parameters = dict(empty_model(config).named_parameters())  # tied ones once
    for name in parts.tensors:
        if name not in parameters:
            raise SurgeryError(f"{files.folder} holds {name}, for which a Llamba of its config.json has no place.")
    for name, parameter in parameters.items():
        if not name.startswith(parts.replaced):
            files.require(name, parameter.shape)
            base_dtypes.add(files.ranges[name].dtype)
    casts = []
    for which, found_dtypes in (("the base", base_dtypes), ("the donor's layers", donor_dtypes)):
        if names := ", ".join(sorted(other.name for other in found_dtypes - {parts.dtype})):
            casts.append(f"{which} cast from {names}")
    return casts


def _find_tokenizer(
    parts: GraftParts, asked: str | None, sources: Mapping[str, str] | None
) -> tuple[Path, str, Source | None]:
    """(folder, its owner in words, its source if that is neither the base nor the donor)."""
    if asked is None and has_tokenizer(parts.base.folder):
        return parts.base.folder, "the base's", None
    if asked is None and has_tokenizer(parts.donor.tokenizer):
        return parts.donor.tokenizer, "the donor's", None
    if name := asked or tokenizer_name(parts.base_name):
        source = resolve(name, need="tokenizer", overrides=sources)
        return source.folder, "as asked" if asked else name, source
    raise SurgeryError(
        f"Neither {parts.base.folder} nor {parts.donor.folder} has a tokenizer. Name one with --tokenizer NAME|PATH."
    )


def donor_prefixes(layers: Iterable[int], heads: Iterable[int | str]) -> tuple[str, ...]:
    """What the names of the donor's tensors begin with, by grafted layers and by layers with grafted heads."""
    return (
        *(f"backbone.layers.{index}." for index in layers),
        *(f"backbone.layers.{index}.attention." for index in heads),
    )


def _in_order(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
