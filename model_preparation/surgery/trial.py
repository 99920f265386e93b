"""One short forward pass of a grafted model before it is written, so that a broken one never is.

In: a `GraftPlan`, a tokenizer, a device. Out: nothing, or the error that says the logits are not finite. On the CPU the
weights stay in their files, and each is let go of once it was used: the largest matrix is what is in memory.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.surgery.graft import GraftPlan, assemble, tensor_ranges
from model_preparation.surgery.tensor_ranges import MappedFiles, TensorRange

PROMPT = "The quick brown fox jumps over the lazy dog."
_HEAD_ROWS = 8192  # of the vocabulary at a time


@torch.no_grad()
def try_out(graft: GraftPlan, tokenizer: PreTrainedTokenizerBase, device: str = "cpu") -> None:
    """Run the model on one sentence, on `device`.

    Raises:
        SurgeryError: if a logit is not finite.
    """
    mapped = MappedFiles()
    model = assemble(graft, device, mapped)
    places = tensor_ranges(graft)
    for name, module in model.backbone.named_modules(prefix="backbone"):
        own = [places[f"{name}.{parameter}"] for parameter, _ in module.named_parameters(recurse=False)]
        module.register_forward_hook(partial(_forget, mapped, own))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(model.device)
    hidden = model.backbone(ids).last_hidden_state  # (1, tokens, d_model)
    head, bias = model.lm_head.weight, model.lm_head.bias
    for start in range(0, graft.config.vocab_size, _HEAD_ROWS):
        rows = slice(start, min(start + _HEAD_ROWS, graft.config.vocab_size))
        logits = nn.functional.linear(hidden, head[rows], None if bias is None else bias[rows])
        _forget(mapped, [place for name, place in places.items() if name in _HEAD_NAMES])
        if not torch.isfinite(logits).all():
            raise SurgeryError(
                f"The grafted model's logits are not finite in {model.dtype}. Check the base, or use --dtype float32."
            )


_HEAD_NAMES = ("lm_head.weight", "backbone.embedding.weight")  # the embedding where they are tied


def _forget(mapped: MappedFiles, places: list[TensorRange], *_: nn.Module | Tensor | tuple) -> None:
    for place in places:
        mapped.forget(place)
