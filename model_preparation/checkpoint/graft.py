"""The parts of a graft, which of their files gives each tensor, and whether the parts fit together.

`find_parts` needs neither torch nor transformers, so a build writes weights while torch and transformers are imported.
`check_parts` needs torch and transformers: it compares configs and shapes, finds the tokenizer, and returns a
`GraftPlan`. `empty_model` is the grafted model without weights.
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

from model_preparation.checkpoint.checkpoint_info import INFO, grafted_heads, is_healed
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
        base_name: the user's name for the base.
        base: where the base is: a model's folder, or a checkpoint's.
        files: the base's weights.
        donor: the extracted layers.
        layers: the indices of all grafted layers, sorted.
        dtype: of every parameter.
        heads: by layer, the donor's heads that are added to the base's mixer, sorted.
        keep_mixer_heads: whether the mixer's heads at the same positions stay too.
        parent: the checkpoint that the graft starts from; None if it starts from a base.
        kept: the layers that were grafted in the parent already, and stay so.
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
        """The layers that this graft adds, sorted."""
        return [index for index in self.layers if index not in self.kept]

    @property
    def new_heads(self) -> dict[int, list[int]]:
        """The heads that this graft adds, by layer."""
        return {index: heads for index, heads in self.heads.items() if index not in self.kept}

    @property
    def donor_layers(self) -> list[int]:
        """The donor's layers that give tensors to this graft, sorted."""
        return sorted([*self.new_layers, *self.new_heads])

    @property
    def replaced_prefixes(self) -> tuple[str, ...]:
        """How the names of all tensors from donors begin, those of earlier grafts too."""
        return donor_prefixes(self.layers, self.heads)

    @property
    def new_prefixes(self) -> tuple[str, ...]:
        """How the names of the tensors begin that this graft adds."""
        return donor_prefixes(self.new_layers, self.new_heads)

    @property
    def ungrafted_prefixes(self) -> tuple[str, ...]:
        """How the names of the tensors begin that come from the parent's own base, because their graft is undone."""
        return donor_prefixes(self.parent.ungrafted if self.parent else [], [])

    @property
    def base_config(self) -> "LlambaConfig":
        """The config of the base, or of the checkpoint that the graft starts from."""
        if self.parent is not None:
            return self.parent.config
        return read_config(self.base.folder)  # type: ignore[return-value]  # by its model_type

    @property
    def keeps_base_tensors(self) -> bool:
        """Whether every tensor that is not grafted equals the base's to the bit. This is not so after healing."""
        return self.parent is None or not is_healed(self.parent.info)

    def files_of(self, name: str) -> TensorFiles:
        """The files of a tensor that does not come from the donor: the base's, the parent's, or its own base's."""
        if self.parent is not None and self.parent.own_base is not None and name.startswith(self.ungrafted_prefixes):
            return self.parent.own_base
        return self.files

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where each parameter lies in a file, by its name in the grafted model. Layer 2 comes before layer 10.

        Raises:
            SurgeryError: if a layer's file is missing or damaged.
        """
        found: dict[str, StoredTensor] = {
            name: place
            for name, place in self.files.ranges.items()
            if not name.startswith((*self.new_prefixes, *self.ungrafted_prefixes))
        }
        if ties_embeddings(self.base.folder) if self.parent is None else self.parent.config.tie_embeddings:
            found.pop("lm_head.weight", None)  # the embedding is used in its place
        if self.parent is not None and self.parent.own_base is not None:
            found |= {
                name: place
                for name, place in self.parent.own_base.ranges.items()
                if name.startswith(self.ungrafted_prefixes) and not name.startswith(self.new_prefixes)
            }
        for index in self.new_layers:
            found |= {f"backbone.layers.{index}.{name}": place for name, place in self.donor.ranges(index).items()}
        for index, heads in self.new_heads.items():
            taken = self.donor.head_ranges(index, heads)
            found |= {f"backbone.layers.{index}.attention.{name}": place for name, place in taken.items()}
        return {name: found[name] for name in sorted(found, key=_natural_order)}

    @property
    def parameters(self) -> int:
        """How many parameters the model has; tied ones count once."""
        return sum(place.numel for place in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """The size of one copy of the weights."""
        return self.parameters * self.dtype.itemsize

    @property
    def base_paths(self) -> list[Path]:
        """The files that determine the base: config, weights, index. Empty for a parent, whose recipe lists them."""
        return [] if self.parent is not None else [self.base.folder / "config.json", *self.files.paths()]


@dataclass(frozen=True)
class GraftPlan(GraftParts):
    """A graft that passed all checks.

    Attributes:
        config: the grafted model's.
        casts: in words, which tensors change their dtype; empty if none does.
        tokenizer: the folder that the tokenizer comes from.
        tokenizer_of: its owner in words.
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
        owners = {} if self.parent is None else self.parent.owners()
        instead = {index: f", instead of {owner}" for index, owner in owners.items()}
        whole = ", the mixer stays whole" if self.keep_mixer_heads else ""
        return [
            *donor.describe(),
            *(f"Layer {index:>3}    <- {donor.path(index)}{instead.get(index, '')}" for index in self.new_layers),
            *(
                f"Layer {index:>3}    <- head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))} of "
                f"{donor.path(index)}{whole}{instead.get(index, '')}"
                for index, heads in self.new_heads.items()
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
                f"Layer {index:>3}    <- the base's own ({parent.own_base.folder})"
                for index in parent.ungrafted
                if parent.own_base
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
    **options: Any,
) -> GraftPlan:
    """`find_parts`, then `check_parts`, with their arguments."""
    parts = find_parts(base_name, layers, llama_layers_dir, dtype=dtype, sources=sources, **options)
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
        layers: indices, in any order, each once; for several donors, a dict of them by donor's name.
        llama_layers_dir: a folder written by `extract_layers`, or an open store; for several donors, folders by name.
        dtype: of the whole model; by default the base's.
        sources: targets by name, as `resolve(overrides=...)` takes them.
        heads: by layer, the donor's heads to add to the base's mixer; for several donors, such a dict by name.
        keep_mixer_heads: whether the mixer's heads at the same positions stay too.
        ungraft: layers of a checkpoint whose graft is undone: they get the weights of the checkpoint's own base again.

    Raises:
        SurgeryError: if base or donor is missing or cannot be read, the base is no Llamba, or a layer is out of range.
    """
    chosen: Mapping[Any, Any] = heads or {}
    has_names = any(isinstance(donor_heads, Mapping) for donor_heads in chosen.values())
    if isinstance(layers, Mapping) or isinstance(llama_layers_dir, Mapping) or has_names:
        layers, llama_layers_dir, chosen = _several_donors(layers, llama_layers_dir, chosen)
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
    dtype = wanted or files.dtype()
    return GraftParts(base_name, base, files, donor, layers, dtype, added, keep_mixer_heads, None, frozenset())


def _several_donors(
    layers: Any, folders: Any, heads: Mapping[Any, Any]
) -> tuple[list[int], LayersOfSeveral, dict[int, Sequence[int]]]:
    """(layers, store, heads) of several donors, from dicts by the donors' names."""
    layers = layers or {}
    are_named = all(isinstance(given, Mapping) for given in (layers, folders, *heads.values()))
    if not are_named or layers.keys() | heads.keys() != folders.keys():
        raise SurgeryError(
            "With several donors, --layers, --heads and --llama_layers_dir need the same names of donors, such as "
            "--layers A:11,13 --heads B:17:3 --llama_layers_dir A=DIR B=DIR."
        )
    chosen = {name: sorted_layers(indices) for name, indices in layers.items()}
    found: dict[int, Sequence[int]] = {}
    for donor_heads in heads.values():
        if both := sorted(found.keys() & donor_heads.keys()):
            raise SurgeryError(f"Heads of layer {both[0]} are named for two donors. Name them for one donor only.")
        found |= donor_heads
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
    """The parts of a graft on a checkpoint: its earlier grafts, without the undone ones, and the new ones."""
    info, folder = parent.info, parent.folder
    check_range([*layers, *heads], info["total_layers"], str(folder))
    if both := sorted(set(parent.ungrafted) & set(layers)):
        raise SurgeryError(
            f"Layer {both[0]} is named in --layers and in --ungraft. Leave it out of --ungraft: --layers replaces it."
        )
    gone = {*parent.ungrafted, *layers}
    whole = [index for index in info["replaced_layers"] if index not in gone]
    if both := sorted(set(whole) & heads.keys()):
        raise SurgeryError(
            f"Layer {both[0]} of {folder} is grafted whole, so it has all heads. Add --ungraft {both[0]} to graft only "
            "these heads."
        )
    old = {index: earlier for index, earlier in grafted_heads(info).items() if index not in {*gone, *heads}}
    keeps = info.get("keep_mixer_heads", False)
    if old and heads and keep_mixer_heads != keeps:
        raise SurgeryError(
            f"{folder} {'keeps' if keeps else 'switches off'} the mixer's heads in layers with grafted heads, and all "
            f"layers of a model must do the same. {'Add' if keeps else 'Leave out'} --keep_mixer_heads, or undo the "
            "earlier heads with --ungraft."
        )
    if not (whole or old or layers or heads):
        raise SurgeryError(f"Nothing would be left grafted in {folder}. Use its base, or leave a layer grafted.")
    stored = float_dtype(info["dtype"])
    assert stored is not None
    if dtype is not None and dtype != stored:
        raise SurgeryError(
            f"{folder} is in {stored.name}, and a graft on it has the same dtype. Leave --dtype {dtype.name} out, or "
            "build from a base."
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
        tokenizer: its name, folder or hub id; by default the base's own, else the donor's.
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
        parts.parent.check_own_base()
    for store in parts.donor.stores:
        _check_donor(base_config, store)
    parts.donor.check(parts.donor_layers)
    donor = parts.donor if parts.donor_layers else None
    config = grafted_config(base_config, donor, parts.layers, parts.heads, parts.keep_mixer_heads, kept=parts.kept)
    casts = _check_tensors(parts, config)
    tokenizer_folder, tokenizer_of, tokenizer_source = _find_tokenizer(parts, tokenizer, sources)
    config.dtype = parts.dtype.torch
    return GraftPlan(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(GraftParts)},
        config=config,
        casts=casts,
        tokenizer=tokenizer_folder,
        tokenizer_of=tokenizer_of,
        tokenizer_source=tokenizer_source,
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
    """The base's config with the settings of the donor's attention, and with the grafted layers and heads.

    The layers in `kept` are already grafted in `base`, and keep their settings.

    Raises:
        SurgeryError: if donors differ in settings that one model cannot have twice, or cannot give single heads.
    """
    from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

    fields = base.file_fields()
    fields.pop("_name_or_path", None)  # a path of this machine
    fields.pop("auto_map", None)  # names files in the base's folder
    fields["architectures"] = [LlambaForCausalLM.__name__]
    # Some bases' configs lack this field. It is always set, so that model.pt has the same bytes for all of them.
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
        assert donor is not None  # it gives every layer that is not kept
        config = donor.config_of(index)
        own = KINDS[config.model_type].settings(config)
        if differing := {name: value for name, value in own.items() if value != fields["llama_cfg"].get(name)}:
            if config.model_type != fields.get("donor_type", "llama") or not differing.keys() <= {*OF_EACH_DONOR}:
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


def _check_donor(base: "LlambaConfig", donor: LayerStore) -> None:
    """Compare the donor's kind, depth, width and vocabulary with the base's. Heads and MLP may differ."""
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
    """Compare every tensor's shape with the grafted config; returns the casts, in words."""
    donor_dtypes: set[DType] = set()
    donor = parts.donor
    for index in parts.donor_layers:
        wanted = layer_shapes(donor.config_of(index))
        ranges = donor.ranges(index)
        donor_dtypes |= {place.dtype for place in ranges.values()}
        found = {name: place.shape for name, place in ranges.items()}
        if differing := sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name)):
            raise SurgeryError(
                f"{donor.path(index)} does not hold the layer that metadata.json beside it describes "
                f"({', '.join(differing[:3])}). Extract the layers again."
            )
    base_dtypes: set[DType] = set()
    parameters = dict(empty_model(config).named_parameters())  # tied parameters appear once
    for name in parts.tensors:
        if name not in parameters:
            raise SurgeryError(f"{parts.files.folder} holds {name}, but a Llamba of its config has no such tensor.")
    for name, parameter in parameters.items():
        if not name.startswith(parts.new_prefixes):
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
    """(folder, owner in words, record of the source). A tokenizer of the base or the donor has no record."""
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
    """The prefixes of the donor's tensors, for grafted layers and for layers with grafted heads."""
    return (
        *(f"backbone.layers.{index}." for index in layers),
        *(f"backbone.layers.{index}.attention." for index in heads),
    )


def _natural_order(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
