"""What a graft is made of: base, donor, layers, and where every tensor of the result lies.

In: names and folders. Out: `GraftParts`, found without torch and transformers, so that weights can be written while
those are imported. Whether the parts fit each other graft.py says.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from model_preparation.checkpoint.layer_store import LayerStore, check_range, sorted_layers
from model_preparation.checkpoint.model_configs import ties_embeddings, type_and_depth
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, donor_name, resolve
from model_preparation.io.tensors.dtypes import DType, float_dtype
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GraftParts:
    """The parts of a graft.

    Attributes:
        base_name: what the user called the base.
        base: where it is.
        files: its weights.
        donor: the extracted layers.
        layers: the indices taken from the donor, sorted.
        dtype: of every parameter.
    """

    base_name: str
    base: Source
    files: TensorFiles
    donor: LayerStore
    layers: list[int]
    dtype: DType

    @cached_property
    def tensors(self) -> dict[str, TensorRange]:
        """Where every parameter of the grafted model lies, by its name there; those of layer 2 before those of 10.

        Raises:
            SurgeryError: if a layer's file is missing or damaged.
        """
        replaced = tuple(f"backbone.layers.{index}." for index in self.layers)
        found = {name: place for name, place in self.files.ranges.items() if not name.startswith(replaced)}
        if ties_embeddings(self.base.folder):
            found.pop("lm_head.weight", None)  # the embedding is the head
        for prefix, index in zip(replaced, self.layers, strict=True):
            found |= {prefix + name: place for name, place in self.donor.ranges(index).items()}
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


def find_parts(
    base_name: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path | LayerStore,
    *,
    dtype: "DType | torch.dtype | str | None" = None,
    sources: Mapping[str, str] | None = None,
) -> GraftParts:
    """Find base and donor.

    Args:
        base_name: a name, folder or hub id of a Llamba, as `sources.resolve` takes it.
        layers: indices, in any order, without repeats.
        llama_layers_dir: a folder written by `extract_layers`, or what stands for one.
        dtype: of the whole model; by default the base's.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if there is no base or no donor, files of theirs cannot be read, the base is no Llamba, or a layer
            is out of its range.
    """
    layers = sorted_layers(layers)
    wanted = float_dtype(dtype)
    if isinstance(llama_layers_dir, LayerStore):
        donor = llama_layers_dir
    else:
        donor = LayerStore(llama_layers_dir, hint=donor_name(base_name, sources))
    base = resolve(base_name, overrides=sources)
    model_type, total = type_and_depth(base.folder)
    if model_type != "llamba":
        raise SurgeryError(f"{base.folder} is a {model_type} model. The base must be a Llamba.")
    check_range(layers, total, str(base.folder))
    files = TensorFiles(base.folder)
    return GraftParts(base_name, base, files, donor, layers, wanted or files.dtype())


def _in_order(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
