"""All layers of base and donor, in memory together, so that any graft can run without a checkpoint."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.graft_plan import GraftPlan
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.io.tensors.tensor_ranges import MappedFiles, PickedTensor
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.cache_bytes import kv_bytes_per_token
from model_preparation.llamba.donor_kinds import KINDS, picked_heads
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer
from model_preparation.search.layer_sets import WHOLE_LAYERS, LayerSet, Units

_ALIGNMENT = 64  # bytes, as torch aligns its own tensors: the rounding of a matrix product may depend on the alignment


@dataclass(frozen=True)
class ModelPair:
    """All layers of both models.

    Attributes:
        model: the base with every layer grafted, or every head. All grafts have its embedding, final norm and LM head.
        base_layers: the base's own layers, by index.
        tokenizer: the tokenizer of every graft.
        fixed: the layers that are grafted already, because the search starts from a checkpoint.
        units: whether layers or heads are grafted.
    """

    model: LlambaForCausalLM
    base_layers: nn.ModuleList
    tokenizer: PreTrainedTokenizerBase
    fixed: frozenset[int] = frozenset()
    units: Units = WHOLE_LAYERS

    @property
    def layers(self) -> int:
        return len(self.base_layers)

    def layer(self, index: int, part: LayerSet) -> Any:
        """The layer of this index with the units in `part`: the base's layer, the donor's, or one with these heads."""
        if part and self.units.heads:
            return _with_heads(self.model, index, [unit % self.units.heads for unit in part])
        return self.model.backbone.layers[index] if part or index in self.fixed else self.base_layers[index]

    def kv_bytes_per_token(self, kv_heads: int) -> int:
        """The bytes that each token adds to a graft's cache: K/V of `kv_heads` heads, and of the layers in `fixed`."""
        of_layer = kv_bytes_per_token(self.model.backbone.llama_config, 1, self.model.dtype)
        return of_layer * len(self.fixed) + of_layer * kv_heads // self.units.kv_heads


def load_pair(planned: GraftPlan, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> ModelPair:
    """Load both models. On the CPU, the weights are memory-mapped: they are read when they are used.

    Args:
        planned: the graft of all layers, or of all heads.
        device: where the models go.
        dtype: the dtype of the weights; by default the dtype of a checkpoint built from `planned`.
    """
    mapped = MappedFiles()

    def load(model: nn.Module, places: dict) -> None:
        state = {
            name: _placed(mapped.tensor(place), planned.dtype.torch, device, dtype) for name, place in places.items()
        }
        model.load_state_dict(state, assign=True)

    model, config = empty_model(planned.config), planned.config
    # All heads of a layer together are its whole matrices, which are mapped and need no copy.
    places = {
        name: place.stored if isinstance(place, PickedTensor) else place for name, place in planned.tensors.items()
    }
    # If embedding and LM head are tied, only the embedding is in the files.
    load(model, {"lm_head.weight": places["backbone.embedding.weight"]} | places)
    model.tie_weights()
    if dtype is not None:
        model.config.dtype = dtype
    model.to(device)
    tokenizer = load_tokenizer(planned.tokenizer)
    units = Units(config.num_attention_heads if planned.heads else 0, config.num_key_value_heads)
    if units.heads:
        layers = [
            layer if index in planned.kept else _with_heads(model, index, [])
            for index, layer in enumerate(model.backbone.layers)
        ]
        return ModelPair(model, nn.ModuleList(layers), tokenizer, planned.kept, units)
    base = empty_model(planned.base_config)
    base_layers = base.backbone.layers
    prefix = "backbone.layers."
    own = planned.files.ranges
    load(base_layers, {name[len(prefix) :]: place for name, place in own.items() if name.startswith(prefix)})
    return ModelPair(model, base_layers.to(device).eval(), tokenizer, planned.kept, units)


def _with_heads(model: LlambaForCausalLM, index: int, heads: Sequence[int]) -> LlambaDecoderLayer:
    """A layer of `model`, with only these heads. The heads' weights are copies; all other tensors are shared."""
    config = copy.copy(model.config)
    config.llama_heads = {str(index): list(heads)}
    with torch.device("meta"):
        layer = LlambaDecoderLayer(config, index, model.backbone.llama_config)
    own = model.backbone.layers[index].state_dict()
    state = {name: tensor for name, tensor in own.items() if not name.startswith("attention.")}
    if heads:
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        for name, picked in picked_heads(heads, *sizes, KINDS[config.donor_type]).items():
            tensor = own[f"attention.{name}"]
            if picked is not None:
                tensor = tensor.index_select(picked[0], torch.tensor(picked[1], device=tensor.device))
            state[f"attention.{name}"] = tensor
    layer.load_state_dict(state, assign=True)
    return layer.eval()


def _placed(tensor: Tensor, stored: torch.dtype, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """Cast a tensor to `stored`, the checkpoint's dtype, then to the dtype in which the model runs."""
    tensor = tensor.to(stored).to(device, dtype or stored)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
