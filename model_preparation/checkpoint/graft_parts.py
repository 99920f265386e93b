"""The parts of a graft: base, donor and parent checkpoint, and the file that each tensor comes from.

This module imports neither torch nor transformers, so a build can write weights while other threads import the two.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.checkpoint_info import grafted_heads, is_healed
from model_preparation.checkpoint.layer_store import LayersOfSeveral, LayerStore, check_range, sorted_layers
from model_preparation.checkpoint.model_configs import read_config, ties_embeddings, type_and_depth
from model_preparation.checkpoint.parent import Parent
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, donor_name, resolve
from model_preparation.io.tensors.dtypes import DType, float_dtype
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.tensors.tensor_ranges import StoredTensor

if TYPE_CHECKING:
    import torch

    from model_preparation.llamba import LlambaConfig


@dataclass(frozen=True)
class GraftParts:
    """The parts of a graft.

    Attributes:
        base_name: the user's name for the base.
        base: where the base is: the folder of a model or of a checkpoint.
        files: the base's weights.
        donor: the extracted layers.
        layers: the indices of all grafted layers, sorted.
        dtype: the dtype of every parameter.
        heads: by layer, the donor's heads that are added to the base's mixer, sorted.
        keep_mixer_heads: whether the mixer's heads at the same positions stay too.
        parent: the checkpoint that the graft starts from; None if it starts from a base.
        kept: the layers, whole or with heads, whose graft stays as it is in the parent.
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
        """The name prefixes of all donors' tensors, including those of earlier grafts."""
        return donor_prefixes(self.layers, self.heads)

    @property
    def new_prefixes(self) -> tuple[str, ...]:
        """The name prefixes of the tensors that this graft adds."""
        return donor_prefixes(self.new_layers, self.new_heads)

    @property
    def ungrafted_prefixes(self) -> tuple[str, ...]:
        """The name prefixes of the layers whose graft is undone. Their tensors come from the parent's own base."""
        return donor_prefixes(self.parent.ungrafted if self.parent else [], [])

    @property
    def base_config(self) -> "LlambaConfig":
        """The config of the base, or of the checkpoint that the graft starts from."""
        if self.parent is not None:
            return self.parent.config
        return read_config(self.base.folder)  # type: ignore[return-value]  # find_base has checked it

    @property
    def keeps_base_tensors(self) -> bool:
        """Whether every tensor that is not grafted is still the base's. Healing changes such tensors."""
        return self.parent is None or not is_healed(self.parent.info)

    def files_of(self, name: str) -> TensorFiles:
        """The files that hold a kept tensor: the files of the base, of the parent, or of the parent's own base."""
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
            found.pop("lm_head.weight", None)  # the model uses the embedding as its head
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
        """How many parameters the model has; tied parameters count once."""
        return sum(place.numel for place in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """The size in bytes of one copy of the weights."""
        return self.parameters * self.dtype.itemsize

    @property
    def base_paths(self) -> list[Path]:
        """The base's config, weights and index. Empty for a graft on a checkpoint: its recipe lists these files."""
        return [] if self.parent is not None else [self.base.folder / "config.json", *self.files.paths()]


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
    """Find base, donor and parent; returns the parts of the graft.

    Args:
        base_name: a name, folder or hub id of a Llamba, as `sources.resolve` takes it; or a checkpoint's folder.
        layers: indices, in any order, each once; for several donors, a dict from donor name to indices.
        llama_layers_dir: a folder written by `extract_layers`, or a `LayerStore`; for several donors, folders by name.
        dtype: the dtype of the whole model; by default the base's.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.
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
            f"Layer {both[0]} is named in --layers and in --heads. A whole layer has all heads: take it out of --heads."
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
            "With several donors, name each donor in --llama_layers_dir, and in --layers or --heads, such as "
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
    """The parts of a graft on a checkpoint: earlier grafts that are not undone, and the new grafts."""
    info, folder = parent.info, parent.folder
    check_range([*layers, *heads], info["total_layers"], str(folder))
    if both := sorted(set(parent.ungrafted) & set(layers)):
        raise SurgeryError(
            f"Layer {both[0]} is named in --layers and in --ungraft. Remove it from --ungraft; --layers is enough."
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


def donor_prefixes(layers: Iterable[int], heads: Iterable[int | str]) -> tuple[str, ...]:
    """The name prefixes of the donor's tensors in grafted layers and in layers with grafted heads."""
    return (
        *(f"backbone.layers.{index}." for index in layers),
        *(f"backbone.layers.{index}.attention." for index in heads),
    )


def _natural_order(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
