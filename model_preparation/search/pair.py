"""Base and donor in memory, layer by layer, so that any graft can be run without building it.

In: a `GraftPlan` of all layers. Out: a `Pair`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.graft import GraftPlan, empty_model
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.io.tensors.tensor_ranges import MappedFiles
from model_preparation.io.untrusted.tokenizer_files import load_tokenizer
from model_preparation.llamba import LlambaForCausalLM

_ALIGNMENT = 64  # bytes, of what torch allocates: the sums of a matrix product may depend on it


@dataclass(frozen=True)
class Pair:
    """All layers of both models.

    Attributes:
        model: the base with every layer the donor's. Embedding, final norm and head are those of any graft.
        base_layers: the base's own layers, by index.
        tokenizer: that of any graft.
    """

    model: LlambaForCausalLM
    base_layers: nn.ModuleList
    tokenizer: PreTrainedTokenizerBase

    @property
    def layers(self) -> int:
        return len(self.base_layers)

    def layer(self, index: int, grafted: bool) -> Any:
        """The donor's layer of this index, or the base's."""
        return self.model.backbone.layers[index] if grafted else self.base_layers[index]


def load_pair(planned: GraftPlan, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Pair:
    """Load both models; on the CPU their weights stay in their files until they are used.

    Args:
        planned: a graft of all layers, whose checks have passed.
        device: where to put them.
        dtype: cast the weights to it; by default to that of the checkpoints that are built from `planned`.
    """
    mapped = MappedFiles()

    def load(model: nn.Module, places: dict) -> None:
        state = {
            name: _placed(mapped.tensor(place), planned.dtype.torch, device, dtype) for name, place in places.items()
        }
        model.load_state_dict(state, assign=True)

    model = empty_model(planned.config)
    # where they are tied, the embedding is the head
    load(model, {"lm_head.weight": planned.tensors["backbone.embedding.weight"]} | planned.tensors)
    model.tie_weights()
    base = empty_model(read_config(planned.base.folder))
    base_layers = base.backbone.layers
    prefix = "backbone.layers."
    own = planned.files.ranges
    load(base_layers, {name[len(prefix) :]: place for name, place in own.items() if name.startswith(prefix)})
    if dtype is not None:
        model.config.dtype = dtype
    return Pair(model.to(device), base_layers.to(device).eval(), load_tokenizer(planned.tokenizer))


def _placed(tensor: Tensor, stored: torch.dtype, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """As a checkpoint would store it, then as it is run."""
    tensor = tensor.to(stored).to(device, dtype or stored)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
