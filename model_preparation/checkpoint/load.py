"""Loads model and tokenizer of a checkpoint. No code is unpickled, and weights are read when they are used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from model_preparation.checkpoint.checkpoint_folder import INDEX
from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, TOKENIZER, read_info
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.checkpoint.wrapper_prefixes import without_wrapper_prefixes
from model_preparation.devices import check_device
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.io.tensors.sharded_weights import TensorFiles, load_tensors
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.untrusted_config import config_from, generation_config_from
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LlambaConfig


def load_checkpoint(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    parallelize: bool = False,
) -> tuple[LlambaForCausalLM, PreTrainedTokenizerBase]:
    """Load a checkpoint folder; returns (model, tokenizer). The model is in eval mode and ready to `generate`.

    The architecture comes from checkpoint_info.json, the weights from model_state_dict.pt or from the shards of a
    folder of format "hf". On the CPU, weights are read when they are used. For a GPU, one tensor at a time is read.
    No code is unpickled, and no code in the folder is run.

    Args:
        directory: a checkpoint's folder. Its state dict may come from a model that DistributedDataParallel or
            torch.compile wrapped.
        device: where to put the model.
        dtype: cast the parameters to this dtype; by default the stored dtype.
        parallelize: ignore `device`, and spread the layers over all GPUs. Layers that do not fit go to the CPU
            (accelerate's device map).

    Raises:
        SurgeryError: if the folder is no complete checkpoint, or its weights do not fit its config.
    """
    directory = Path(directory).expanduser()
    dtype = torch_dtype(dtype)
    device = "cpu" if parallelize else device
    check_device(device)
    info = read_info(directory)
    try:
        config = config_from(info["config"], LlambaConfig)
        generation_config = generation_config_from(info["generation_config"])
    except ValueError as error:
        raise SurgeryError(f"{directory / INFO} describes no model ({error}). Build the checkpoint again.") from error
    model = empty_model(config)
    is_hf = info.get("format") == "hf"
    path = directory / (INDEX if is_hf else STATE_DICT)
    if is_hf:
        state_dict = _read_shards(directory, model)
    elif path.exists():
        state_dict = without_wrapper_prefixes(load_tensors(path, "Build the checkpoint again."))
    else:
        raise SurgeryError(what_it_is(directory) or f"{path} is missing. Build the checkpoint again.")
    _check_fit(model, state_dict, path)
    model.load_state_dict(
        {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in state_dict.items()}, assign=True
    )
    model.tie_weights()
    if dtype is not None:
        model.config.dtype = dtype
    model.generation_config = generation_config
    model = spread(model) if parallelize else model.to(device)
    return model, load_tokenizer(directory if is_hf else directory / TOKENIZER)


def bare_model(info: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LlambaForCausalLM:
    """A model of the architecture in `info` with these weights. It is on the CPU, in eval mode, without any wrapper.

    Args:
        info: a checkpoint_info.json.
        tensors: a whole state dict, which is cast to `dtype`.
    """
    config = config_from({**info["config"], "dtype": str(dtype).removeprefix("torch.")}, LlambaConfig)
    model = empty_model(config)
    model.load_state_dict({name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation_config_from(info["generation_config"])
    return model.requires_grad_(True)


def spread(model: PreTrainedModel) -> Any:
    """Spread a model evenly over all GPUs, by accelerate. No layer is split."""
    from accelerate import dispatch_model, infer_auto_device_map  # slow to import
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules)
    max_memory = get_balanced_memory(model, no_split_module_classes=whole, dtype=model.dtype)
    return dispatch_model(model, infer_auto_device_map(model, max_memory, whole, dtype=model.dtype))


def _read_shards(folder: Path, model: LlambaForCausalLM) -> dict[str, Tensor]:
    """The state dict in the shards, memory-mapped. The shards hold tied tensors once."""
    foreign = folder / SAFE_WEIGHTS_NAME
    if foreign.exists():
        raise SurgeryError(
            f"{foreign} does not belong to this checkpoint, but it would be read instead of the shards. Move it away."
        )
    files = TensorFiles(folder)
    state_dict = {name: files[name] for name in files.ranges}
    if model.config.tie_embeddings:
        state_dict |= {tied: state_dict[name] for tied, name in model._tied_weights_keys.items() if name in state_dict}
    return state_dict


def _check_fit(model: LlambaForCausalLM, state_dict: Mapping[str, Tensor], path: Path) -> None:
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state_dict.items()}
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = differing[0]
        raise SurgeryError(
            f"{path} does not fit {INFO}: {len(differing)} tensors differ, {name} has shape "
            f"{list(found[name]) if name in found else 'none'} instead of "
            f"{list(wanted[name]) if name in wanted else 'none'}. Build the checkpoint again."
        )
