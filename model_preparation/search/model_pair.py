"""Base and donor in memory, layer by layer, so that any graft can run without a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.graft import GraftPlan, empty_model
from model_preparation.io.tensors.tensor_ranges import MappedFiles
from model_preparation.io.untrusted.tokenizer_files import load_tokenizer
from model_preparation.llamba import LlambaForCausalLM

_ALIGNMENT = 64  # bytes, as torch allocates; the sums of a matrix product may depend on it


@dataclass(frozen=True)
class ModelPair:
    """All layers of both models.

    Attributes:
        model: the graft of every layer. Every other graft has the same embedding, final norm and head.
        base_layers: the base's own layers, by index.
        tokenizer: the tokenizer of every graft.
        fixed: the layers that are a donor's in the base already, because the search starts from a checkpoint.
    """

    model: LlambaForCausalLM
    base_layers: nn.ModuleList
    tokenizer: PreTrainedTokenizerBase
    fixed: frozenset[int] = frozenset()

    @property
    def layers(self) -> int:
        return len(self.base_layers)

    def layer(self, index: int, grafted: bool) -> Any:
        """The donor's layer of this index, or the base's."""
        return self.model.backbone.layers[index] if grafted else self.base_layers[index]


def load_pair(planned: GraftPlan, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> ModelPair:
    """Load both models. On the CPU, weights stay in their files until they are used.

    Args:
        planned: the graft of all layers.
        device: where the models go.
        dtype: the dtype of the weights; by default that of a checkpoint built from `planned`.
    """
    mapped = MappedFiles()

    def load(model: nn.Module, places: dict) -> None:
        state = {
            name: _placed(mapped.tensor(place), planned.dtype.torch, device, dtype) for name, place in places.items()
        }
        model.load_state_dict(state, assign=True)

    model = empty_model(planned.config)
    # If they are tied, the embedding is the head.
    load(model, {"lm_head.weight": planned.tensors["backbone.embedding.weight"]} | planned.tensors)
    model.tie_weights()
    base = empty_model(planned.base_config)
    base_layers = base.backbone.layers
    prefix = "backbone.layers."
    own = planned.files.ranges
    load(base_layers, {name[len(prefix) :]: place for name, place in own.items() if name.startswith(prefix)})
    if dtype is not None:
        model.config.dtype = dtype
    tokenizer = load_tokenizer(planned.tokenizer)
    return ModelPair(model.to(device), base_layers.to(device).eval(), tokenizer, planned.kept)


def _placed(tensor: Tensor, stored: torch.dtype, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """Cast a tensor as a checkpoint stores it, then as it runs."""
    tensor = tensor.to(stored).to(device, dtype or stored)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
