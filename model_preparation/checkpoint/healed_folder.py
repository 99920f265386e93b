"""A healed model as a checkpoint folder of the formats that a build writes.

In: the tensors of the trained model, and the parent checkpoint they came from. Out: a new folder, whole or not there;
the parent is only read. Every tensor that still is the parent's, bit by bit, keeps its origin (base or donor); the
others are marked as healed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.checkpoint_info import (
    FORMAT_VERSION,
    FORMATS,
    HEALED,
    INFO,
    MODULE,
    README,
    STATE_DICT,
    TENSOR_DIGESTS,
    TOKENIZER,
)
from model_preparation.checkpoint.checkpoint_readme import readme_text
from model_preparation.checkpoint.graft import empty_model
from model_preparation.checkpoint.hf_folder import write_model
from model_preparation.checkpoint.model_code import code_digests
from model_preparation.checkpoint.model_digests import recorded_weights
from model_preparation.checkpoint.tensor_digests import read_tensor_digests
from model_preparation.io.complete_folder import new_folder
from model_preparation.io.digests import describe_files
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.tensors.pt_writer import write_together
from model_preparation.io.tensors.tensor_ranges import bytes_of
from model_preparation.io.untrusted.untrusted_config import config_from, generation_config_from
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.versions import creation_time, versions

_OF_THE_PARENT = (
    "replaced_layers",
    "num_replaced_layers",
    "total_layers",
    "base_model",
    "replacement_source",
    "tokenizer_source",
    "num_heads",
    "head_dim",
    "parameters",
)
ADAPTER, TRAINING_LOG, LOSS_CURVE = "adapter", "training_log.jsonl", "loss_curve.png"


def bare_model(parent_info: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LlambaForCausalLM:
    """A model of the parent's architecture with these weights: on the CPU, in eval mode, in nobody's wrapper.

    Args:
        tensors: a whole state dict; cast to `dtype`.
    """
    config = config_from({**parent_info["config"], "dtype": str(dtype).removeprefix("torch.")}, LlambaConfig)
    model = empty_model(config)
    model.load_state_dict({name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation_config_from(parent_info["generation_config"])
    return model.requires_grad_(True)


def write_healed(
    model: LlambaForCausalLM,
    parent: Path,
    parent_info: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    healing: Mapping[str, Any],
    format: str,
    description: str = "",
    overwrite: bool = False,
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the folder; returns its checkpoint_info.json.

    Args:
        model: from `bare_model`.
        parent: the checkpoint's folder that was healed.
        healing: what was done, for checkpoint_info.json.
        format: as `checkpoint.write` takes it.
        extras: by name, what else goes into the folder: a function that writes to the path it is given.

    Raises:
        SurgeryError: if the folder is taken and not to be overwritten.
        OSError: from the file system: disk full, input/output error.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    with new_folder(output_dir, overwrite=overwrite, marker_file=INFO) as staging:
        files: dict[str, dict] = {}
        size_bytes = FORMATS[format] * sum(p.nbytes for p in model.parameters())
        with bar("Writing", size_bytes, in_bytes=True) as advance:
            if format != "hf":
                paths = [staging / MODULE, staging / STATE_DICT]
                written = write_together(paths, {}, lambda _: [model, model.state_dict()], advance)
                files = {path.name: described for path, described in written.files.items()}
                tokenizer.save_pretrained(staging / TOKENIZER)
            if format != "pt":
                write_model(staging, model, tokenizer, parent_info["generation_config"], advance)
                files |= describe_files(staging, excluded=files)
        digests = {"format_version": FORMAT_VERSION, "tensors": _tensor_digests(model, dtype, parent)}
        (staging / TENSOR_DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        for name, write in (extras or {}).items():
            write(staging / name)
        info = {
            "format_version": FORMAT_VERSION,
            **{name: parent_info[name] for name in _OF_THE_PARENT if name in parent_info},
            "parent": describe_parent(parent, parent_info),
            "healing": dict(healing),
            "dtype": dtype,
            "creation_time": creation_time(),
            "description": description,
            "mmlu_score": None,
            "digests": {"weights": recorded_weights(staging)},
            "config": model.config.file_fields(),
            "generation_config": parent_info["generation_config"],
            "versions": versions(),
            "code": code_digests(),
            "format": format,
            "files": files,
        }
        (staging / README).write_text(readme_text(info), encoding="utf-8")
        info["files"] |= describe_files(staging, excluded=info["files"])
        data = with_checksum(info)
        (staging / INFO).write_bytes(data)
    return json.loads(data)


def describe_parent(parent: Path, parent_info: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a checkpoint from any other: its folder's name, and the digest of its tensors' digests."""
    return {
        "id": parent.resolve().name,
        "tensor_digests_sha256": parent_info["files"][TENSOR_DIGESTS]["sha256"],
        "mmlu_score": parent_info.get("mmlu_score"),
    }


def _tensor_digests(model: LlambaForCausalLM, dtype: str, parent: Path) -> dict[str, Any]:
    before = read_tensor_digests(parent / TENSOR_DIGESTS)
    digests: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        digest = blake3(bytes_of(tensor)).hexdigest()
        same = name in before and before[name].blake3 == digest and str(before[name].dtype) == f"torch.{dtype}"
        origin = before[name].origin if same else HEALED
        digests[name] = {"dtype": dtype, "shape": list(tensor.shape), "from": origin, "blake3": digest}
    return digests
