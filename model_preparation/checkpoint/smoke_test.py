"""One short forward pass of a grafted model, while its files are written. If a logit is not finite, the build fails.

Large matrices stay in their files: a few rows at a time are read, cast, moved to the device, used and freed.
Small tensors and grafted heads are loaded.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.graft_plan import GraftPlan
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_ranges import MappedFiles, TensorRange

PROMPT = "The quick brown fox jumps over the lazy dog."
_PIECE_BYTES = 8 << 20


@torch.no_grad()
def smoke_test(
    graft: GraftPlan,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    check_stopped: Callable[[], object],
) -> None:
    """Run the model on one sentence.

    Args:
        device: where the model runs.
        check_stopped: called before each piece of a matrix; it may raise an exception, which ends the test.

    Raises:
        SurgeryError: if a logit is not finite.
    """
    torch.set_num_threads(1)  # for this thread: meanwhile, the other cores write and compute digests
    mapped = MappedFiles()
    places = {"lm_head.weight": graft.tensors["backbone.embedding.weight"]} | graft.tensors  # a tied head
    dtype = graft.dtype.torch
    model = empty_model(graft.config)
    for name, module in list(model.named_modules()):
        place = places.get(f"{name}.weight")
        if isinstance(module, (nn.Linear, nn.Embedding)) and isinstance(place, TensorRange):
            module.weight = None  # type: ignore[assignment]
            forward = _forward_from_file(module, place, dtype, mapped, check_stopped)
            module.forward = forward  # type: ignore[method-assign, assignment]
        for key, _ in list(module.named_parameters(recurse=False)):
            tensor = mapped.tensor(places[f"{name}.{key}"]).to(device, dtype)
            setattr(module, key, nn.Parameter(tensor, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.to(device))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    if not torch.isfinite(model(ids).logits).all():
        raise SurgeryError(
            f"The grafted model's logits are not finite in {graft.dtype}. Check the base, or use --dtype float32."
        )


def _forward_from_file(
    module: nn.Linear | nn.Embedding,
    place: TensorRange,
    dtype: torch.dtype,
    mapped: MappedFiles,
    check_stopped: Callable[[], object],
) -> Callable[[Tensor], Tensor]:
    """A `forward` for the module. Each call reads the weight, of shape (rows, columns), from its file."""

    def embed(ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, columns)."""
        return mapped.tensor(place)[ids.cpu()].to(ids.device, dtype)

    def multiply(inputs: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        mapped.expect(place)
        rows = place.shape[0]
        piece_rows = max(1, _PIECE_BYTES * rows // place.size_bytes)
        outputs = []
        for start in range(0, rows, piece_rows):
            check_stopped()
            piece = place.rows(start, start + piece_rows)
            outputs.append(nn.functional.linear(inputs, mapped.tensor(piece).to(inputs.device, dtype)))
            mapped.forget(piece)
        joined, bias = torch.cat(outputs, dim=-1), module.bias
        return joined if bias is None else joined + bias  # type: ignore[operator]

    return embed if isinstance(module, nn.Embedding) else multiply
