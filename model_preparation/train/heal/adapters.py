"""LoRA adapters: adds one to a model, saves it without the model, loads it, or merges it into the model's weights.

An adapter's folder has peft's own format (adapter_config.json, adapter_model.safetensors). Source: arXiv 2106.09685.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from model_preparation.checkpoint.wrapper_prefixes import without_wrapper_prefixes
from model_preparation.errors import SurgeryError
from model_preparation.io.untrusted.untrusted_files import read_json
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.train.heal.load_weights import KeyReport, compare_keys, read_weights
from model_preparation.train.heal.settings import HealSettings

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = ("adapter_model.bin", "adapter_model.pth", "adapter_model.pt")


def add_lora(model: LlambaForCausalLM, settings: HealSettings) -> PeftModel:
    """The model with a new adapter on every linear layer except the head. Only the adapter is trained."""
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # it takes fractions too
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return _adapted(model, config)


@dataclass(frozen=True)
class Adapter:
    """An adapter without its model: its tensors, float32, and the fields of its config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def adapter_of(model: PeftModel) -> Adapter:
    """The adapter of a model. The config names no folder of this machine."""
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in get_peft_model_state_dict(model).items()}
    fields = model.peft_config["default"].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    return Adapter(
        tensors, {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    )


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter into `folder`, which is made if needed."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, folder / ADAPTER_WEIGHTS)
    config = json.dumps(adapter.config, indent=2, default=str) + "\n"
    (folder / ADAPTER_CONFIG).write_text(config, encoding="utf-8")


def load_adapter(model: LlambaForCausalLM, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Add the adapter in `folder` to a model. Tensors' names may begin with `module.` or `_orig_mod.`.

    Raises:
        SurgeryError: if there is no adapter, or a tensor is missing, unexpected, or of another shape.
    """
    if not is_adapter(folder):
        raise SurgeryError(
            f"{folder} has no {ADAPTER_CONFIG}. Give the folder of an adapter, such as OUTPUT_DIR/adapter."
        )
    try:
        fields = read_json(folder / ADAPTER_CONFIG)
        config = LoraConfig(**(fields | {"inference_mode": not trainable}))
    except (OSError, ValueError, TypeError) as error:
        raise SurgeryError(f"{folder / ADAPTER_CONFIG} is no config of a LoRA adapter ({error}).") from error
    try:
        adapted = _adapted(model, config)
    except ValueError as error:  # the model has no module with such a name
        raise SurgeryError(f"The adapter in {folder} does not fit the model ({str(error)[:200]}).") from error
    load_adapter_weights(adapted, folder)
    return adapted


def load_adapter_weights(adapted: PeftModel, folder: Path) -> KeyReport:
    """Load the adapter in a folder into a model that has one already. SurgeryError unless all tensors fit."""
    names = (ADAPTER_WEIGHTS, *_PICKLED_WEIGHTS)
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise SurgeryError(f"{folder} has no adapter's weights (none of {', '.join(names)}).")
    tensors = without_wrapper_prefixes(read_weights(path))
    report = compare_keys(get_peft_model_state_dict(adapted), tensors)
    if not report.complete:
        raise SurgeryError(f"The adapter in {folder} does not fit the model: {'; '.join(report.lines())}.")
    set_peft_model_state_dict(adapted, tensors)
    return report


@torch.no_grad()
def merge(adapted: PeftModel) -> LlambaForCausalLM:
    """The model with the adapter added into its weights: W + (alpha / rank) B A."""
    return adapted.merge_and_unload(safe_merge=True)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def _adapted(model: LlambaForCausalLM, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of a property of transformers
        return peft.get_peft_model(model, config)
