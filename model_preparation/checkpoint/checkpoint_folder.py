"""Completes a checkpoint's folder: adds all other files to the weights, checkpoint_info.json last.

This is the last step of builds, rebuilds and healing. A folder without checkpoint_info.json is no checkpoint.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.checkpoint_info import (
    FORMAT_VERSION,
    FORMATS,
    HEALED,
    INFO,
    README,
    TENSOR_DIGESTS,
    TOKENIZER,
    descent_of,
)
from model_preparation.checkpoint.model_code import AUTO_MAP, code_digests, package_code
from model_preparation.checkpoint.readme import readme_text
from model_preparation.checkpoint.write_weights import shard_file, write_model
from model_preparation.creation_time import creation_time
from model_preparation.io.complete_folder import new_folder
from model_preparation.io.digests import describe_file, describe_files
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import with_checksum
from model_preparation.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

INDEX = "model.safetensors.index.json"
ADAPTER, TRAINING_LOG, LOSS_CURVE = "adapter", "training_log.jsonl", "loss_curve.png"  # only in healed checkpoints

_COPIED_FROM_PARENT = (  # fields of checkpoint_info.json that healing does not change
    "replaced_layers",
    "num_replaced_layers",
    "grafted_heads",
    "keep_mixer_heads",
    "total_layers",
    "base_model",
    "replacement_source",
    "other_donors",
    "tokenizer_source",
    "num_heads",
    "head_dim",
    "parameters",
)


def finish_folder(
    folder: Path,
    info: Mapping[str, Any],
    *,
    format: str,
    files: Mapping[str, dict],
    tensors: Mapping[str, dict[str, Any]],
    config: "LlambaConfig",
    generation_config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    review: Callable[[dict[str, Any]], None] = lambda info: None,
) -> dict[str, Any]:
    """Turn a folder with weights into a complete checkpoint; returns its checkpoint_info.json.

    Args:
        info: the fields of checkpoint_info.json that only the caller knows.
        format: "pt", "hf" or "both".
        files: {"bytes", "sha256"} of files, by name, if they are known already. All other files are read.
        tensors: the entries of tensor_digests.json: dtype, shape, origin and BLAKE3 of every tensor of the state dict.
        config: the model's config.
        generation_config: the fields of the model's generation config.
        review: called with the fields of checkpoint_info.json before it is written; may change them, or raise.

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    from model_preparation.checkpoint.model_digests import weights_digest  # imports torch

    if format != "hf":
        tokenizer.save_pretrained(folder / TOKENIZER)
    if format != "pt":
        _write_hf_files(folder, tensors, config, generation_config, tokenizer)
    write_json(folder / TENSOR_DIGESTS, {"format_version": FORMAT_VERSION, "tensors": tensors})
    weights = {name: (entry["dtype"], entry["shape"], entry["blake3"]) for name, entry in tensors.items()}
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **info,
        "creation_time": creation_time(),
        "config": config.file_fields(),
        "generation_config": dict(generation_config),
        "versions": versions(),
        "code": code_digests(),
        "format": format,
        "files": {**files, **describe_files(folder, excluded=files)},
        "digests": {"weights": weights_digest(weights), **info.get("digests", {})},
    }
    (folder / README).write_text(readme_text(found), encoding="utf-8")
    found["files"][README] = describe_file(folder / README)
    review(found)
    data = with_checksum(found)
    (folder / INFO).write_bytes(data)
    return json.loads(data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_hf_files(
    folder: Path,
    tensors: Mapping[str, dict[str, Any]],
    config: "LlambaConfig",
    generation_config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Write all files that `from_pretrained(folder, trust_remote_code=True)` reads, except the shards."""
    import torch
    from transformers import GenerationConfig

    from model_preparation.llamba import LlambaForCausalLM

    tied = LlambaForCausalLM._tied_weights_keys if config.tie_embeddings else ()
    sizes = {"total_parameters": 0, "total_size": 0}
    weight_map = {}
    for name in sorted(tensors.keys() - tied):
        weight_map[name] = shard_file(name)
        numel = math.prod(tensors[name]["shape"])
        sizes["total_parameters"] += numel
        sizes["total_size"] += numel * getattr(torch, tensors[name]["dtype"]).itemsize
    write_json(folder / INDEX, {"metadata": sizes, "weight_map": weight_map})
    write_json(folder / "config.json", {**config.file_fields(), "auto_map": AUTO_MAP})
    GenerationConfig(**generation_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, path in package_code().items():
        shutil.copyfile(path, folder / name)


def write_healed(
    model: "LlambaForCausalLM",
    parent: Path,
    parent_info: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    output_dir: Path,
    *,
    healing: Mapping[str, Any],
    format: str,
    description: str,
    overwrite: bool,
    extras: Mapping[str, Callable[[Path], object]],
) -> dict[str, Any]:
    """Write a healed model as a checkpoint; returns its checkpoint_info.json. The parent is only read.

    Args:
        model: from `load.bare_model`.
        parent: the folder of the checkpoint that was healed.
        parent_info: the parent's checkpoint_info.json.
        healing: how the model was trained, for checkpoint_info.json.
        format: "pt", "hf" or "both".
        extras: further files: a function by file name. It gets the path and writes the file.

    Raises:
        SurgeryError: if the folder exists and `overwrite` is not set.
        OSError: from the file system: disk full, input/output error.
    """
    with new_folder(output_dir, overwrite=overwrite, marker_file=INFO) as staging:
        size_bytes = FORMATS[format] * sum(parameter.nbytes for parameter in model.parameters())
        with bar("Writing", size_bytes, in_bytes=True) as advance:
            files = write_model(staging, model, format, advance)
        for name, write in extras.items():
            write(staging / name)
        return finish_folder(
            staging,
            {
                **{name: parent_info[name] for name in _COPIED_FROM_PARENT if name in parent_info},
                "parent": describe_parent(parent, parent_info),
                "descent": [
                    *descent_of(parent_info),
                    {"from": describe_parent(parent, parent_info), "healed": healing["method"]},
                ],
                "healing": dict(healing),
                "digests": {
                    name: digest for name, digest in parent_info.get("digests", {}).items() if name == "donor_layers"
                },
                "dtype": str(model.dtype).removeprefix("torch."),
                "description": description,
                "mmlu_score": None,
            },
            format=format,
            files=files,
            tensors=_healed_digests(model, parent),
            config=model.config,
            generation_config=parent_info["generation_config"],
            tokenizer=tokenizer,
        )


def describe_parent(parent: Path, parent_info: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a parent in checkpoint_info.json: folder name, digest of tensor_digests.json, MMLU score."""
    return {
        "id": parent.resolve().name,
        "tensor_digests_sha256": parent_info["files"][TENSOR_DIGESTS]["sha256"],
        "mmlu_score": parent_info.get("mmlu_score"),
    }


def _healed_digests(model: "LlambaForCausalLM", parent: Path) -> dict[str, dict[str, Any]]:
    """The entries of tensor_digests.json. A tensor that healing changed has the origin "healed"."""
    from blake3 import blake3

    from model_preparation.checkpoint.model_digests import read_tensor_digests
    from model_preparation.io.tensors.tensor_ranges import bytes_of

    before = read_tensor_digests(parent / TENSOR_DIGESTS)
    digests: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        digest = blake3(bytes_of(tensor)).hexdigest()
        same = name in before and before[name].blake3 == digest and str(before[name].dtype) == str(tensor.dtype)
        dtype = str(tensor.dtype).removeprefix("torch.")
        origin = before[name].origin if same else HEALED
        digests[name] = {"dtype": dtype, "shape": list(tensor.shape), "from": origin, "blake3": digest}
    return digests
