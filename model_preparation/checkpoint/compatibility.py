"""Checks whether base and donor fit: depth, width, vocabulary, and the shapes of all tensors."""

from typing import TYPE_CHECKING

from model_preparation.checkpoint.graft_parts import GraftParts
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.checkpoint.model_configs import layer_shapes
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.dtypes import DType

if TYPE_CHECKING:
    from model_preparation.llamba import LlambaConfig


def check_donor(base: "LlambaConfig", donor: LayerStore) -> None:
    """Check that the donor's depth, width and vocabulary are the base's. Heads and MLP may differ."""
    donor.check_is_donor()
    config = donor.config
    numbers = [
        ("number of layers", config.num_hidden_layers, (base.n_layer,)),
        ("width (hidden_size)", config.hidden_size, (base.d_model,)),
        ("vocabulary size", config.vocab_size, (base.vocab_size, base.padded_vocab_size)),
    ]
    for what, found, wanted in numbers:
        if found not in wanted:
            raise SurgeryError(
                f"The donor's {what} is {found}, the base's is {wanted[0]}. "
                f"Extract the layers of the base's own donor into {donor.folder}."
            )


def check_tensors(parts: GraftParts, config: "LlambaConfig") -> list[str]:
    """Compare the tensors' shapes with the configs of donor and grafted model. Return the casts, in words."""
    donor_dtypes: set[DType] = set()
    donor = parts.donor
    for index in parts.donor_layers:
        wanted = layer_shapes(donor.config_of(index))
        ranges = donor.ranges(index)
        donor_dtypes |= {place.dtype for place in ranges.values()}
        found = {name: place.shape for name, place in ranges.items()}
        if differing := sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name)):
            raise SurgeryError(
                f"{donor.path(index)} does not hold the layer that its folder's metadata.json describes "
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
