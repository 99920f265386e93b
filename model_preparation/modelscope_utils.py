"""Load a base or donor by name: `get_model_modelscope("unaligned_llamba")`.

Import it as `modelscope_utils` inside this folder, and as `model_preparation.modelscope_utils` elsewhere.
"""

from typing import TYPE_CHECKING

from model_preparation.checkpoint.model_configs import check_kind, heads_of, type_and_depth
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import Source, has_tokenizer, resolve, tokenizer_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def get_model_modelscope(
    name: str, device: "str | torch.device" = "cpu", dtype: "torch.dtype | str | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, int, int]":
    """Load a donor or a Llamba, with its own tokenizer or else the one that `sources.tokenizer_name` names.

    Args:
        name: a name of `sources.TABLE`, a folder, or a hub id.
        device: where the model goes.
        dtype: of the weights; None keeps the stored dtype.

    Returns:
        `(model, tokenizer, num_heads, head_dim)`, with the model in eval mode. For a donor, `num_heads` counts query
        heads; for a Llamba, the value heads of a mixer. `head_dim` is the width of one of these heads.

    Raises:
        SurgeryError: if the model is missing, is neither a donor nor a Llamba, or has no known tokenizer.
    """
    from model_preparation.evaluation.models import load_folder  # imports torch and transformers

    source = resolve(name)
    model_type, _ = type_and_depth(source.folder)
    if model_type != "llamba":
        check_kind(model_type, f"{source.folder} is")
    tokenizer = _tokenizer(name, source)
    model = load_folder(source.folder, dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method's signature
    return model, tokenizer, *heads_of(model.config)


def _tokenizer(name: str, source: Source) -> "PreTrainedTokenizerBase":
    from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

    if has_tokenizer(source.folder):
        return load_tokenizer(source.folder)
    published_apart = tokenizer_name(name)
    if published_apart is None:
        raise SurgeryError(f"{source.folder} holds no tokenizer, and none is known for {name}. Copy one into it.")
    return load_tokenizer(resolve(published_apart, need="tokenizer").folder)
