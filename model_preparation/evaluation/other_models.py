"""The models that a checkpoint is compared with: its donor, its base, other checkpoints, any model in a folder.

In: what --compare_with was given, and the checkpoint. Out: first the folders, before anything is loaded; then, one at a
time, model and tokenizer. No code that lies in a folder is run.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.checkpoint.layer_store import HEAD, text_part, without_head
from model_preparation.checkpoint.load import load_checkpoint, spread
from model_preparation.checkpoint.model_configs import read_generation_config
from model_preparation.checkpoint.rebuild import target_of
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation_flags import RECORDED
from model_preparation.hub.sources import has_tokenizer, is_replaced, resolve
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.tokenizer_files import load_tokenizer
from model_preparation.io.untrusted.untrusted_config import generation_config_from


@dataclass(frozen=True)
class OtherModel:
    """A model to compare with, under the name that it was asked for by."""

    name: str
    folder: Path
    is_checkpoint: bool


def find_others(
    names: Sequence[str], checkpoint: str | Path, *, sources: Mapping[str, str] | None = None
) -> list[OtherModel]:
    """Where the models are, downloaded if need be.

    Args:
        names: "donor" and "base" as the checkpoint records them; a checkpoint's folder; what `resolve` takes.
        checkpoint: the folder of the checkpoint that is compared with them.
        sources: targets by name, as `resolve(overrides=...)` takes them; for donor and base too, if they were recorded
            under such a name.

    Raises:
        SurgeryError: for a folder that is not there or not complete, or a model that cannot be had.
    """
    return [_find(name, Path(checkpoint).expanduser(), sources or {}) for name in names]


def _find(name: str, checkpoint: Path, sources: Mapping[str, str]) -> OtherModel:
    if name not in RECORDED:
        folder = Path(name).expanduser()
        if (folder / INFO).is_file():
            read_info(folder)
            return OtherModel(name, folder, is_checkpoint=True)
        return OtherModel(name, resolve(name, overrides=sources).folder, is_checkpoint=False)
    recorded = read_info(checkpoint).get(RECORDED[name])
    try:
        if not isinstance(recorded, dict):
            raise TypeError(f"{RECORDED[name]} is {recorded!r}")
        if recorded.get("legacy"):
            raise SurgeryError(
                f"The {name} of {checkpoint} was imported from old layer files, which are no model. "
                "Give the folder of the model they are of by --compare_with."
            )
        replaced = is_replaced(recorded["name"], sources)
        target = recorded["name"] if replaced else target_of(recorded, "--compare_with DIR")
    except (KeyError, TypeError) as error:
        raise SurgeryError(
            f"{checkpoint / INFO} does not say what its {name} is ({error!r}). Give that model's folder instead."
        ) from error
    return OtherModel(name, resolve(target, overrides=sources).folder, is_checkpoint=False)


def load_other(
    other: OtherModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    parallelize: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, the model in eval mode, its own decoding settings put aside.

    Args:
        tokenizer: for a model published without one, as Llamba is: that of the checkpoint compared.
        device, dtype, parallelize: as in `load_checkpoint`.

    Raises:
        SurgeryError: if it cannot be loaded, lacks weights, or has too small a vocabulary for `tokenizer`.
    """
    if other.is_checkpoint:
        return load_checkpoint(other.folder, device=device, dtype=dtype, parallelize=parallelize)
    own = has_tokenizer(other.folder)
    if own:
        tokenizer = load_tokenizer(other.folder)
    model = load_folder(other.folder, dtype)
    if not own and model.config.vocab_size < len(tokenizer):
        raise SurgeryError(
            f"{other.folder} has no tokenizer, and the checkpoint's has {len(tokenizer)} tokens, the model only "
            f"{model.config.vocab_size}. Copy the model's own tokenizer into the folder."
        )
    given = model.generation_config
    eos = tokenizer.eos_token_id if given.eos_token_id is None else given.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    model.generation_config = GenerationConfig(bos_token_id=given.bos_token_id, eos_token_id=eos, pad_token_id=pad)
    if parallelize:
        return spread(model), tokenizer
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method's own signature
    return model, tokenizer


def load_folder(folder: Path, dtype: torch.dtype | str | None) -> PreTrainedModel:
    """The model in a folder, in eval mode, on the CPU; of a multimodal one the Llama in it.

    Raises:
        SurgeryError: if it cannot be loaded, or lacks weights.
    """
    loading: dict[str, Any]
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own; in a log it is noise
    try:
        text = text_part(folder)
        model_class = LlamaForCausalLM if text else AutoModelForCausalLM
        model, loading = model_class.from_pretrained(
            None if text else folder,
            **text,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if text and (fields := read_generation_config(folder)):
            model.generation_config = generation_config_from(fields)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise SurgeryError(
            what_it_is(folder) or f"No model can be loaded from {folder} ({reason}). Give another folder."
        ) from error
    if set(loading["missing_keys"]) == {HEAD}:
        raise without_head(folder)
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(loading["missing_keys"])
        raise SurgeryError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them. Download the model again.")
    return model.eval()
