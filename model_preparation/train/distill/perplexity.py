"""Perplexity of a donor and of Llambas made from it, with one layer of each in memory at a time."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.train_layer import apply_layer

Layer = Callable[[Tensor], Tensor]  # takes and returns hidden states (batch, length, width), on any device


@torch.no_grad()
def perplexities(
    donor: Donor,
    tokens: Tensor,
    layers_of: Callable[[int], Mapping[str, Layer]],
    names: Sequence[str],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The perplexity of each model in `names`: exp of the mean cross-entropy without each sequence's first token.

    All models have the donor's embedding, final norm and head.

    Args:
        tokens: (sequences, length) int64.
        layers_of: called with the index of a layer; returns this layer of each model, by the model's name.
        advance: called after each layer.
    """
    files, config = donor.files, donor.config
    embedded = files["model.embed_tokens.weight"][tokens].float()
    states = {name: embedded.clone() for name in names}
    for index in range(config.num_hidden_layers):
        for name, layer in layers_of(index).items():
            apply_layer(layer, states[name], states[name])
        advance()
    norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.data = files["model.norm.weight"].float()
    head = files["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].float()
    return {name: math.exp(_mean_loss(norm(values), head, tokens)) for name, values in states.items()}


def _mean_loss(states: Tensor, head: Tensor, tokens: Tensor) -> float:
    """The mean cross-entropy, one sequence at a time: the logits of all would need more memory than everything else."""
    total = 0.0
    for values, sequence in zip(states, tokens, strict=True):
        total += F.cross_entropy(values[:-1] @ head.t(), sequence[1:], reduction="sum").item()
    return total / tokens[:, 1:].numel()
