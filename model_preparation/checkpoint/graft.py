"""What a graft is made of, whether its parts fit together, and the empty model for its tensors.

`find_parts` needs neither torch nor transformers, so a build writes weights while those are imported. `check_parts`
needs both: it compares configs and shapes, finds the tokenizer, and returns a `GraftPlan`.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from model_preparation.checkpoint.checkpoint_info import INFO, grafted_heads
from model_preparation.checkpoint.layer_store import (
    LayersOfSeveral,
    LayerStore,
    check_heads,
    check_range,
    sorted_layers,
)
from model_preparation.checkpoint.model_configs import (
    heads_of,
    layer_shapes,
    read_config,
    ties_embeddings,
    type_and_depth,
)
from model_preparation.checkpoint.parent import Parent
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, donor_name, has_tokenizer, resolve, tokenizer_name
from model_preparation.io.tensors.dtypes import DType, float_dtype
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import StoredTensor
from model_preparation.llamba.donor_kinds import KINDS, OF_EACH_DONOR

if TYPE_CHECKING:
    import torch

    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM


@dataclass(frozen=True)
class GraftParts:
    """The parts of a graft.

    Attributes:
        base_name: what the user called the base.
        base: where it is: a model's folder, or a checkpoint's.
        files: its weights.
        donor: the extracted layers.
        layers: the indices of the layers that are the donor's, sorted.
        dtype: of every parameter.
        heads: by layer, the donor's heads that are added to the base's mixer, sorted.
        keep_mixer_heads: whether the mixer's heads of the same place stay beside them.
        parent: the checkpoint that the graft starts from; None if that is a base.
        kept: the layers whose graft is the parent's.
    """

    base_name: str
    base: Source
    files: TensorFiles
    donor: LayerStore
    layers: list[int]
    dtype: DType
    heads: dict[int, list[int]]
    keep_mixer_heads: bool
    parent: Parent | None
    kept: frozenset[int]

    @property
    def new_layers(self) -> list[int]:
        """The layers that are grafted now, sorted."""
        return [index for index in self.layers if index not in self.kept]

    @property
    def new_heads(self) -> dict[int, list[int]]:
        """The heads that are grafted now, by layer."""
        return {index: heads for index, heads in self.heads.items() if index not in self.kept}

    @property
    def donor_layers(self) -> list[int]:
        """The layers of the donor that tensors are taken from, sorted."""
        return sorted([*self.new_layers, *self.new_heads])

    @property
    def replaced(self) -> tuple[str, ...]:
        """What the names of the donors' tensors begin with, per layer."""
        return donor_prefixes(self.layers, self.heads)

    @property
    def new(self) -> tuple[str, ...]:
        """What the names of the tensors begin with that are taken from the donor now."""
        return donor_prefixes(self.new_layers, self.new_heads)

    @property
    def ungrafted(self) -> tuple[str, ...]:
        """What the names of the tensors begin with that are taken from the parent's own base."""
        return donor_prefixes(self.parent.ungrafted if self.parent else [], [])

    @property
    def base_config(self) -> "LlambaConfig":
        """The config of the base, or of the checkpoint that the graft starts from."""
        if self.parent is not None:
            return self.parent.config
        return read_config(self.base.folder)  # type: ignore[return-value]  # by its model_type

    @property
    def has_the_bases_tensors(self) -> bool:
        """Whether all that is not grafted is the base's to the bit."""
        return self.parent is None or self.parent.has_the_bases_tensors

    def files_of(self, name: str) -> TensorFiles:
        """The files that hold a tensor which is not taken from the donor now."""
        if self.parent is not None and self.parent.own is not None and name.startswith(self.ungrafted):
            return self.parent.own
        return self.files

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where every parameter of the grafted model lies, by its name there. Layer 2 comes before layer 10.

        Raises:
            SurgeryError: if a layer's file is missing or damaged.
        """
        found: dict[str, StoredTensor] = {
            name: place
            for name, place in self.files.ranges.items()
            if not name.startswith((*self.new, *self.ungrafted))
        }
        if ties_embeddings(self.base.folder) if self.parent is None else self.parent.config.tie_embeddings:
            found.pop("lm_head.weight", None)  # the embedding is the head
        if self.parent is not None and self.parent.own is not None:
            own = self.parent.own.ranges.items()
            found |= {name: at for name, at in own if name.startswith(self.ungrafted) and not name.startswith(self.new)}
        for index in self.new_layers:
            found |= {f"backbone.layers.{index}.{name}": at for name, at in self.donor.ranges(index).items()}
        for index, heads in self.new_heads.items():
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
        """The files that determine the base: its config, its weights, their index. A parent's recipe has them."""
        return [] if self.parent is not None else [self.base.folder / "config.json", *self.files.paths()]


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
        theirs = kv_bytes_per_token(self.config.llama_config(), self.config.n_layer, self.dtype.torch)
        kept_heads, kept_size = heads_of(self.config)
        heads, size = self.config.num_attention_heads, self.config.head_dim
        total = self.config.n_layer
        return [
            f"Base         {self.base.id if self.base.hub == 'embedded' else self.base.folder}",
            *self._describe_parent(),
            *self._describe_donor(),
            f"Kept         {total - len(self.layers)} of {total} layers, and all around them",
            f"Heads        {heads} of width {size} in grafted layers, {kept_heads} of width {kept_size} in kept ones",
            f"K/V cache    {ours:,} bytes per token; the donor's has {theirs:,}",
            f"Dtype        {self.dtype.name}" + "".join(f"; {cast}" for cast in self.casts),
            f"Tokenizer    {self.tokenizer_of} ({self.tokenizer})",
            f"Weights      {decimal(self.weight_bytes)} ({self.parameters:,} parameters)",
        ]

    def _describe_donor(self) -> list[str]:
        donor = self.donor
        before = {} if self.parent is None else self.parent.owners()
        instead = {index: f", instead of {owner}" for index, owner in before.items()}
        whole = ", the mixer stays whole" if self.keep_mixer_heads else ""
        return [
            *donor.describe(),
            *(f"Layer {index:>3}    <- {donor.path(index)}{instead.get(index, '')}" for index in self.new_layers),
            *(
                f"Layer {index:>3}    <- head{'s' * (len(of_layer) > 1)} {', '.join(map(str, of_layer))} of "
                f"{donor.path(index)}{whole}{instead.get(index, '')}"
                for index, of_layer in self.new_heads.items()
            ),
        ]

    def _describe_parent(self) -> list[str]:
        if (parent := self.parent) is None:
            return []
        owners = parent.owners()
        return [
            f"Which is     a checkpoint, built on {parent.info['base_model']['id']}",
            *(f"Layer {index:>3}    stays {owners[index]}" for index in sorted(self.kept)),
            *(
                f"Layer {index:>3}    <- the base's own ({parent.own.folder})"
                for index in parent.ungrafted
                if parent.own
            ),
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
    layers: Sequence[int] | Mapping[str, Sequence[int]],
    llama_layers_dir: str | Path | LayerStore | Mapping[str, str | Path],
    *,
    dtype: "DType | torch.dtype | str | None" = None,
    sources: Mapping[str, str] | None = None,
    heads: Mapping[int, Sequence[int]] | Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    keep_mixer_heads: bool = False,
    ungraft: Sequence[int] = (),
) -> GraftParts:
    """Find base and donor.

    Args:
        base_name: a name, folder or hub id of a Llamba, as `sources.resolve` takes it; or a checkpoint's folder.
        layers: indices, in any order, each once; of several donors, by a name for each.
        llama_layers_dir: a folder written by `extract_layers`, or an open store; of several donors, folders by name.
        dtype: of the whole model; by default the base's.
        sources: targets by name, as `resolve(overrides=...)` takes them.
        heads: by layer, the donor's heads to add to the base's mixer; of several donors, such a dict by name.
        keep_mixer_heads: whether the mixer's heads of the same place stay beside them.
        ungraft: grafted layers of a checkpoint that get back what its recipe's base has there.

    Raises:
        SurgeryError: if base or donor is missing or cannot be read, the base is no Llamba, or a layer is out of range.
    """
    chosen: Mapping[Any, Any] = heads or {}
    has_names = any(isinstance(of_donor, Mapping) for of_donor in chosen.values())
    if isinstance(layers, Mapping) or isinstance(llama_layers_dir, Mapping) or has_names:
        layers, llama_layers_dir, chosen = _of_several(layers, llama_layers_dir, chosen)
    added = {index: sorted_layers(chosen[index], "head") for index in sorted(chosen)}
    ungraft = sorted_layers(ungraft) if len(ungraft) else []
    layers = sorted_layers(layers) if len(layers) or not (added or ungraft) else []
    if both := sorted(added.keys() & set(layers)):
        raise SurgeryError(
            f"Layer {both[0]} is named in --layers and in --heads. A whole layer has all heads: name it once."
        )
    wanted = float_dtype(dtype)
    parent = Parent.at(base_name, ungraft, sources)
    if isinstance(llama_layers_dir, LayerStore):
        donor = llama_layers_dir
    elif layers or added:
        hint = parent.info["replacement_source"].get("name") if parent else donor_name(base_name, sources)
        donor = LayerStore(llama_layers_dir, hint=hint)
    else:
        donor = LayersOfSeveral([])
    if parent is not None:
        return _on_parent(parent, base_name, donor, layers, added, wanted, keep_mixer_heads)
    base, total = find_base(base_name, sources)
    check_range([*layers, *added], total, str(base.folder))
    files = TensorFiles(base.folder)
    kept: frozenset[int] = frozenset()
    dtype = wanted or files.dtype()
    return GraftParts(base_name, base, files, donor, layers, dtype, added, keep_mixer_heads, None, kept)


def _of_several(
    layers: Any, folders: Any, heads: Mapping[Any, Any]
) -> tuple[list[int], LayersOfSeveral, dict[int, Sequence[int]]]:
    """The layers and heads of several donors, and where they are; from a dict of each, by name."""
    layers = layers or {}
    are_named = all(isinstance(given, Mapping) for given in (layers, folders, *heads.values()))
    if not are_named or layers.keys() | heads.keys() != folders.keys():
        raise SurgeryError(
            "Layers and heads of several donors need a name for each, and the same names for their folders, such as "
            "--layers A:11,13 --heads B:17:3 --llama_layers_dir A=DIR B=DIR."
        )
    chosen = {name: sorted_layers(indices) for name, indices in layers.items()}
    found: dict[int, Sequence[int]] = {}
    for of_donor in heads.values():
        if both := sorted(found.keys() & of_donor.keys()):
            raise SurgeryError(f"Heads of layer {both[0]} are named for two donors. Take those of one.")
        found |= of_donor
    stores = [
        (LayerStore(folder, hint=None), [*chosen.get(name, []), *heads.get(name, {})])
        for name, folder in folders.items()
    ]
    return [index for own in chosen.values() for index in own], LayersOfSeveral(stores), found


def _on_parent(
    parent: Parent,
    name: str,
    donor: LayerStore,
    layers: list[int],
    heads: dict[int, list[int]],
    dtype: DType | None,
    keep_mixer_heads: bool,
) -> GraftParts:
    """The parts of a graft on a checkpoint: what it has, without what goes, with what comes."""
    info, folder = parent.info, parent.folder
    check_range([*layers, *heads], info["total_layers"], str(folder))
    if both := sorted(set(parent.ungrafted) & set(layers)):
        raise SurgeryError(
            f"Layer {both[0]} is named in --layers and in --ungraft. --layers alone replaces a layer that is grafted."
        )
    gone = {*parent.ungrafted, *layers}
    whole = [index for index in info["replaced_layers"] if index not in gone]
    if both := sorted(set(whole) & heads.keys()):
        raise SurgeryError(
            f"Layer {both[0]} of {folder} is grafted whole, so it has all heads. Add --ungraft {both[0]} to have only "
            "these."
        )
    old = {index: of_layer for index, of_layer in grafted_heads(info).items() if index not in {*gone, *heads}}
    keeps = info.get("keep_mixer_heads", False)
    if old and heads and keep_mixer_heads != keeps:
        raise SurgeryError(
            f"{folder} {'keeps' if keeps else 'switches off'} the mixer's heads beside its grafted ones, and a model "
            f"does one or the other. {'Add' if keeps else 'Leave out'} --keep_mixer_heads, or --ungraft those layers."
        )
    if not (whole or old or layers or heads):
        raise SurgeryError(f"Nothing would be left grafted in {folder}. Use its base, or leave a layer grafted.")
    stored = float_dtype(info["dtype"])
    assert stored is not None
    if dtype is not None and dtype != stored:
        raise SurgeryError(
            f"{folder} is in {stored.name}, and a graft on it stays so. Leave --dtype {dtype.name} out, or build from "
            "a base."
        )
    all_heads = {index: (old | heads)[index] for index in sorted(old | heads)}
    return GraftParts(
        base_name=name,
        base=Source(folder, "local", folder.name, None),
        files=parent.files,
        donor=donor,
        layers=sorted([*whole, *layers]),
        dtype=stored,
        heads=all_heads,
        keep_mixer_heads=keeps if old else keep_mixer_heads,
        parent=parent,
        kept=frozenset([*whole, *old]),
    )


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
    base_config = parts.base_config
    if base_config.has_attention and parts.parent is None:
        raise SurgeryError(
            f"{parts.base.folder} has grafted layers already, but no {INFO}. Start from a base or from a checkpoint."
        )
    if parts.parent is not None:
        parts.parent.check_own()
    for store in parts.donor.stores:
        _check_donor(base_config, store)
    parts.donor.check(parts.donor_layers)
    donor = parts.donor if parts.donor_layers else None
    config = grafted_config(base_config, donor, parts.layers, parts.heads, parts.keep_mixer_heads, kept=parts.kept)
    casts = _check_tensors(parts, config)
    tokenizer_folder, tokenizer_of, other = _find_tokenizer(parts, tokenizer, sources)
    config.dtype = parts.dtype.torch
    return GraftPlan(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(GraftParts)},
        config=config,
        casts=casts,
        tokenizer=tokenizer_folder,
        tokenizer_of=tokenizer_of,
        tokenizer_source=other,
    )


def grafted_config(
    base: "LlambaConfig",
    donor: LayerStore | None,
    layers: Sequence[int],
    heads: Mapping[int, Sequence[int]] = MappingProxyType({}),
    keep_mixer_heads: bool = False,
    *,
    kept: Collection[int] = (),
) -> "LlambaConfig":
    """The base's config with the settings of the donor's attention; it names the donor's layers and heads.

    Layers in `kept` are grafted in the base already, and keep their settings.

    Raises:
        SurgeryError: if donors differ in more than each layer can have for itself, or cannot give single heads.
    """
    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

    fields = base.file_fields()
    fields.pop("_name_or_path", None)  # a path of this machine
    fields.pop("auto_map", None)  # names files in the base's folder
    fields["architectures"] = [LlambaForCausalLM.__name__]
    # The same bytes in model.pt, whether the base's config named them or not.
    fields["label2id"] = {label: int(index) for index, label in fields.get("id2label", {}).items()}
    fields["llama_layers"] = list(layers)
    fields["llama_heads"] = {str(index): list(of_layer) for index, of_layer in heads.items()}
    fields["keep_mixer_heads"] = keep_mixer_heads and bool(heads)
    if donor is not None and not kept:
        fields["donor_type"] = donor.config.model_type
        fields["llama_cfg"] = KINDS[donor.config.model_type].settings(donor.config)
        fields["max_position_embeddings"] = donor.config.max_position_embeddings
    others = fields.get("other_llama_cfgs", {})
    fields["other_llama_cfgs"] = {index: others[index] for index in others if int(index) in kept}
    for index in sorted({*layers, *heads} - {*kept}):
        assert donor is not None  # who gives what is not kept
        config = donor.config_of(index)
        own = KINDS[config.model_type].settings(config)
        if odd := {name: value for name, value in own.items() if value != fields["llama_cfg"].get(name)}:
            if config.model_type != fields.get("donor_type", "llama") or not odd.keys() <= {*OF_EACH_DONOR}:
                raise SurgeryError(
                    f"Layer {index} is of a donor with other settings than the first's: {', '.join(odd)}. "
                    f"Layers of one model may differ in {', '.join(OF_EACH_DONOR)} only: give another donor."
                )
            fields["other_llama_cfgs"][str(index)] = odd
    for index, of_layer in heads.items():
        check_heads(index, of_layer, fields["llama_cfg"]["num_attention_heads"])
    if heads and fields["llama_cfg"].get("attention_bias"):
        raise SurgeryError(
            "The donor's attention has a bias on its output (attention_bias), which belongs to no head. Graft whole "
            "layers with --layers, or give another donor."
        )
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
    model.backbone.make_rotary_embeddings()
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
    donor_dtypes: set[DType] = set()
    donor = parts.donor
    for index in parts.donor_layers:
        wanted = layer_shapes(donor.config_of(index))
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
            raise SurgeryError(f"{parts.files.folder} holds {name}, for which a Llamba of its config has no place.")
    for name, parameter in parameters.items():
        if not name.startswith(parts.new):
            files = parts.files_of(name)
            files.require(name, parameter.shape)
            base_dtypes.add(files.ranges[name].dtype)
    casts = []
    for which, found_dtypes in (("the base", base_dtypes), ("the donor's layers", donor_dtypes)):
        if names := ", ".join(sorted(other.name for other in found_dtypes - {parts.dtype})):
            casts.append(f"{which} cast from {names}")
    return casts


def _find_tokenizer(
    parts: GraftParts, asked: str | None, sources: Mapping[str, str] | None
) -> tuple[Path, str, dict[str, str | None] | None]:
    """(folder, its owner in words, the record of its source if that is neither the base nor the donor)."""
    if asked is None and parts.parent is not None:
        return parts.parent.tokenizer, "the checkpoint's", parts.parent.info.get("tokenizer_source")
    if asked is None and has_tokenizer(parts.base.folder):
        return parts.base.folder, "the base's", None
    if asked is None and has_tokenizer(parts.donor.tokenizer):
        return parts.donor.tokenizer, "the donor's", None
    if name := asked or tokenizer_name(parts.base_name):
        source = resolve(name, need="tokenizer", overrides=sources)
        return source.folder, "as asked" if asked else name, source.as_dict()
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
