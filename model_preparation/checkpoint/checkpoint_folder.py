"""The one writer of checkpoint folders: it adds all other files to the weights, checkpoint_info.json last.

Builds, rebuilds and healing end here. A folder without checkpoint_info.json is no checkpoint.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from model_preparation.checkpoint.checkpoint_info import (
    FORMAT_VERSION,
    FORMATS,
    HEALED,
    INFO,
    README,
    TENSOR_DIGESTS,
    TOKENIZER,
    descent_of,
    head_spec,
    is_healed,
)
from model_preparation.checkpoint.model_code import AUTO_MAP, code_digests, package_code
from model_preparation.checkpoint.weights import shard_file, write_model
from model_preparation.hub.sources import donors_of
from model_preparation.io.complete_folder import new_folder
from model_preparation.io.digests import describe_file, describe_files
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import with_checksum
from model_preparation.versions import creation_time, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

INDEX = "model.safetensors.index.json"
ADAPTER, TRAINING_LOG, LOSS_CURVE = "adapter", "training_log.jsonl", "loss_curve.png"  # only of healed checkpoints

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

_TEXT = """\
{title}
{underline}

{summary}

Files
{files}
  tensor_digests.json   the origin and the digest of each tensor
  checkpoint_info.json  layers, sources, digests, config: also the recipe to build it again
{shared}
{needs} Run the
lines below in this folder. In another folder, write this folder's path before the file names.

{ways}
The model is on the CPU; model.cuda() moves it.
"""

_PT_FILES = """\
  model.pt              the whole model ({size}), ready to use
  model_state_dict.pt   its state dict
  tokenizer/            the tokenizer"""

_HF_FILES = """\
  *.safetensors         the weights ({size}), a file per layer
  *.json, tokenizer*    the index of these files, the configs, the tokenizer
  *.py                  the model's code, for transformers without our package"""

_SHARED = """
Other checkpoints may share the .safetensors files by links: replace one if you must, but never write into it.
"""

_NEEDS = "Loading needs the package `model_preparation` installed (pip install PATH_TO_THE_REPOSITORY)."
_HF_NEEDS = "Loading needs transformers, and for way 1 the package `model_preparation`."

_LOAD_CHECKPOINT = """\
Model and tokenizer at once. Nothing is unpickled, and weights are read when they are used:

    from model_preparation import load_checkpoint
    model, tokenizer = load_checkpoint(".")
    inputs = tokenizer("Hello world", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

_PT_WAYS = [
    """\
The whole model. With the package imported, torch.load reads it safely:

    import model_preparation
    import torch
    from transformers import AutoTokenizer
    model = torch.load("model.pt")
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")

   Without that import, on a file you trust, torch.load("model.pt", weights_only=False) does the same:

    import torch
    model = torch.load("model.pt", weights_only=False)
""",
    """\
The state dict, into the architecture that checkpoint_info.json describes:

    import json
    import torch
    from transformers import AutoModelForCausalLM
    from model_preparation import LlambaConfig
    with open("checkpoint_info.json", encoding="utf-8") as file:
        config = LlambaConfig.from_dict(json.load(file)["config"])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(torch.load("model_state_dict.pt"), strict=True)
""",
]

_HF_WAY = """\
transformers alone, without our package. It runs the .py files of this folder: read them, or trust who made it.
They were tested with {tested}.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)

   lm-eval in the same way:  lm_eval --model hf --model_args pretrained=.,trust_remote_code=True --tasks mmlu
"""


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
    """Make a checkpoint of a folder that has its weights; returns its checkpoint_info.json.

    Args:
        info: the fields of checkpoint_info.json that only the caller knows.
        format: "pt", "hf" or "both".
        files: {"bytes", "sha256"} by name of files with known digests; the others are read.
        tensors: the entries of tensor_digests.json: dtype, shape, origin and BLAKE3 of every tensor of the state dict.
        config: the model's config.
        generation_config: the fields of its generation config.
        review: called with checkpoint_info.json before it is written; may change it or raise.

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
    """Write all files that `from_pretrained(folder, trust_remote_code=True)` reads besides the shards."""
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
        parent_info: its checkpoint_info.json.
        healing: how the model was trained, for checkpoint_info.json.
        format: "pt", "hf" or "both".
        extras: by name of a further file, a function that writes the file to a path.

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
    """The record of a parent in its children's checkpoint_info.json: its folder's name and its tensors' digest."""
    return {
        "id": parent.resolve().name,
        "tensor_digests_sha256": parent_info["files"][TENSOR_DIGESTS]["sha256"],
        "mmlu_score": parent_info.get("mmlu_score"),
    }


def _healed_digests(model: "LlambaForCausalLM", parent: Path) -> dict[str, dict[str, Any]]:
    """The entries of tensor_digests.json. A tensor with the parent's bytes keeps its origin; others are "healed"."""
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


def readme_text(info: dict[str, Any]) -> str:
    """The text of README.txt. It depends on the recipe alone, not on the folder's name or later scores.

    Args:
        info: checkpoint_info.json, which need not be complete yet.
    """
    from model_preparation.llamba.transformers_versions import TESTED  # imports transformers

    grafted = [f"layers {', '.join(map(str, info['replaced_layers']))}"] if info["replaced_layers"] else []
    grafted += [f"heads {heads} (layer:heads)"] if (heads := head_spec(info)) else []
    donors = " and ".join(donor["id"] for donor in donors_of(info))
    title = f"{info['base_model']['id']} with {' and '.join(grafted)} of {donors}"
    summary = [
        f"{info['num_replaced_layers']} of {info['total_layers']} layers are replaced; weights in {info['dtype']}. "
        "Scores are in checkpoint_info.json.",
    ]
    if "healing" in info:
        healing = info["healing"]
        title += ", healed"
        summary.append(
            f"Healed from {info['parent']['id']} by method {healing['method']}, {healing['steps']} steps; "
            f"held-out loss {_loss(healing['scores']['before'])} before, {_loss(healing['scores']['after'])} after."
        )
    elif is_healed(info):
        summary.append(f"Built on {info['descent'][-1]['from']['id']}, which is healed, or was built on a healed one.")
    if info["description"]:
        summary.insert(0, info["description"])
    has_pt, has_hf = info["format"] != "hf", info["format"] != "pt"
    files, ways = [], [_LOAD_CHECKPOINT]
    if has_pt:
        files.append(_PT_FILES.format(size=decimal(info["files"]["model.pt"]["bytes"])))
        ways += _PT_WAYS
    if has_hf:
        shards = [entry["bytes"] for name, entry in info["files"].items() if name.endswith(".safetensors")]
        files.append(_HF_FILES.format(size=decimal(sum(shards))))
        ways.append(_HF_WAY.format(tested=TESTED))
    return _TEXT.format(
        title=title,
        underline="=" * len(title),
        summary="\n".join(summary),
        files="\n".join(files),
        shared=_SHARED if has_hf else "",
        needs=_NEEDS if has_pt else _HF_NEEDS,
        ways="\n".join(f"{number}. {way}" for number, way in enumerate(ways, start=1)),
    )


def _loss(scores: dict[str, Any]) -> str:
    return "unknown" if scores["eval_loss"] is None else f"{scores['eval_loss']:.4f}"
