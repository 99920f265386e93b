"""The checkpoint folder: written whole or not at all, and loaded without unpickling code.

In: a `GraftPlan`. Out: model_checkpoints/NAME/ with model.pt (the whole module), model_state_dict.pt, tokenizer/, or
what hf_folder.py describes, or both; README.txt; and checkpoint_info.json, which is written last: a folder without it
is no checkpoint.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rich.progress
import safetensors
import torch
import transformers
from rich.filesize import decimal
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

import model_preparation
from model_preparation.errors import SurgeryError
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM
from model_preparation.surgery.beside import Beside
from model_preparation.surgery.block_io import Advance
from model_preparation.surgery.checkpoint_readme import readme_text
from model_preparation.surgery.digests import describe_files, describe_source_file
from model_preparation.surgery.graft import GraftPlan, base_paths, empty_model, plan, tensor_ranges
from model_preparation.surgery.hf_folder import INDEX, HfFolder, read_state_dict
from model_preparation.surgery.layer_store import heads_of, read_generation_config
from model_preparation.surgery.new_folder import check_space, check_target, new_folder
from model_preparation.surgery.pt_writer import placeholder, write_together
from model_preparation.surgery.seal import seal
from model_preparation.surgery.store_folder import STORE
from model_preparation.surgery.tensor_copy import TensorSource
from model_preparation.surgery.tensor_files import load_tensors
from model_preparation.surgery.timestamps import creation_time
from model_preparation.surgery.tokenizer_files import load_tokenizer
from model_preparation.surgery.trial import try_out
from model_preparation.surgery.untrusted_config import config_from, generation_config_from
from model_preparation.surgery.untrusted_files import check_fields, read_json

FORMAT_VERSION = 1
FORMATS = ("pt", "hf", "both")
INFO = "checkpoint_info.json"
MODULE = "model.pt"
STATE_DICT = "model_state_dict.pt"
TENSOR_DIGESTS = "tensor_digests.json"
TOKENIZER = "tokenizer"

_INFO_FIELDS = {"replaced_layers": list, "total_layers": int, "config": dict, "generation_config": dict, "files": dict}
_SMALL_FILES_BYTES = 64_000_000  # tokenizer, JSON and README, generously
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def build_checkpoint(
    base: str,
    layers: Sequence[int],
    llama_layers_dir: str | Path,
    output_dir: str | Path,
    *,
    tokenizer: str | None = None,
    description: str = "",
    score: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    format: str = "pt",
    overwrite: bool = False,
    allow_other_heads: bool = False,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Replace `layers` of `base` by the donor's and write the checkpoint; returns its checkpoint_info.json.

    The arguments are those of `graft.plan` and of `write`.

    Raises:
        SurgeryError: for anything that makes the graft impossible or wrong; nothing is left on the disk then.
    """
    _check_format(format)
    check_target(Path(output_dir).expanduser(), overwrite=overwrite, complete_mark=INFO)
    graft = plan(
        base,
        layers,
        llama_layers_dir,
        tokenizer=tokenizer,
        dtype=dtype,
        allow_other_heads=allow_other_heads,
        sources=sources,
    )
    return write(
        graft, output_dir, description=description, score=score, device=device, format=format, overwrite=overwrite
    )


def write(
    graft: GraftPlan,
    output_dir: str | Path,
    *,
    description: str = "",
    score: float | None = None,
    device: str = "cpu",
    format: str = "pt",
    overwrite: bool = False,
    confirm: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Graft, try the model once on `device`, and write the folder; returns its checkpoint_info.json.

    Args:
        output_dir: appears whole or not at all.
        description: free text for people.
        score: an MMLU score known beforehand, as a fraction of 1.
        device: where the trial forward pass runs; what is written is always on the CPU.
        format: "pt" for model.pt and model_state_dict.pt, "hf" for what transformers opens without this package (see
            hf_folder.py; the shards of untouched layers are shared with the checkpoints beside it), or "both".
        overwrite: replace a checkpoint that is there; it stays whole until the new one is.
        confirm: called with the new checkpoint_info.json before anything is put in place; may raise.

    Raises:
        SurgeryError: if the target is taken or not writable, the disk too small, or the trial's logits not finite.
    """
    _check_format(format)
    target = Path(output_dir).expanduser()
    check_target(target, overwrite=overwrite, complete_mark=INFO)
    check_room(graft, target, format)
    tokenizer = load_tokenizer(graft.tokenizer)
    check_tokenizer(tokenizer, graft)
    generation_config = _generation_config(graft, tokenizer)
    hf_folder = None if format == "pt" else HfFolder(graft, target.resolve().parent)
    if hf_folder is not None:
        hf_folder.store.examine_base()

    with new_folder(target, overwrite=overwrite, complete_mark=INFO) as staging:
        with Beside() as beside, rich.progress.Progress(*_progress_columns(), transient=True) as progress:
            trial = beside.start(try_out, graft, tokenizer, device, beside.check)
            base_files = beside.start(_base_files, graft, hf_folder, beside.check)
            copies = {"pt": 2, "hf": 1, "both": 3}[format]
            task = progress.add_task("Writing", total=copies * graft.weight_bytes)

            def advance(size_bytes: int) -> None:
                progress.advance(task, size_bytes)
                beside.raise_failure()

            files: dict[str, dict] = {}
            digests: dict[str, str] = {}
            for write_weights in _writers(graft, generation_config, hf_folder, format):
                more_files, more_digests = write_weights(staging, advance)
                files |= more_files
                digests |= more_digests
            trial.result()
            info = _info(graft, base_files.result(), description, score, generation_config)
        if format != "hf":
            tokenizer.save_pretrained(staging / TOKENIZER)
        if hf_folder is not None:
            hf_folder.write_rest(staging, tokenizer, generation_config)
        _write_json(staging / TENSOR_DIGESTS, _tensor_digests(graft, digests))
        info |= {"format": format, "files": files}
        (staging / "README.txt").write_text(readme_text(info), encoding="utf-8")
        info["files"] |= describe_files(staging, excluded=info["files"])
        sealed = seal(info)
        if confirm is not None:
            confirm(info)
        (staging / INFO).write_bytes(sealed)
    return json.loads(sealed)


def check_room(graft: GraftPlan, output_dir: Path, format: str = "pt") -> None:
    """Raise SurgeryError if the disk `output_dir` will be on is too small for what will be written there."""
    needed_bytes = _SMALL_FILES_BYTES + _pt_bytes(graft, format)
    if format == "pt":
        check_space(output_dir, needed_bytes)
        return
    hf_folder = HfFolder(graft, output_dir.resolve().parent)
    try:
        check_space(output_dir, needed_bytes + hf_folder.bytes_to_write())
    except SurgeryError:  # unless most of it is stored already, which to know may take reading the base
        check_space(output_dir, needed_bytes + hf_folder.bytes_to_write(read_base=True))


def describe_writing(graft: GraftPlan, output_dir: Path, format: str) -> str:
    """What `write` will write, in a line to print."""
    size_bytes = _pt_bytes(graft, format)
    if format == "pt":
        return f"to write   {decimal(size_bytes)} in {MODULE} and {STATE_DICT}"
    size_bytes += HfFolder(graft, output_dir.resolve().parent).bytes_to_write()
    return f"to write   {decimal(size_bytes)}; shards of the base that {STORE} beside the checkpoint holds are shared"


def load_checkpoint(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlambaForCausalLM, PreTrainedTokenizerBase]:
    """Load a checkpoint folder: (model, tokenizer), the model in eval mode and ready to `generate`.

    The architecture comes from checkpoint_info.json and the weights from model_state_dict.pt, or from the shards of a
    folder of format "hf". They are mapped: on the CPU nothing is read before it is used, elsewhere one tensor at a time
    is. No code is unpickled, and none that lies in the folder is run.

    Args:
        directory: a folder written by `write`; its state dict may since have been saved from a model wrapped by
            DistributedDataParallel or torch.compile.
        device: where to put the model.
        dtype: cast the parameters to it; by default as stored.

    Raises:
        SurgeryError: if the folder is no complete checkpoint, or its weights do not fit its config.
    """
    directory = Path(directory).expanduser()
    info = read_info(directory)
    try:
        config = config_from(info["config"], LlambaConfig)
        generation_config = generation_config_from(info["generation_config"])
    except ValueError as error:
        raise SurgeryError(f"{directory / INFO} describes no model ({error}). Build the checkpoint again.") from error
    model = empty_model(config)
    is_hf = info.get("format") == "hf"
    path = directory / (INDEX if is_hf else STATE_DICT)
    state_dict = read_state_dict(directory, model) if is_hf else without_wrapper_prefixes(_read_state_dict(path))
    _check_fit(model, state_dict, path)
    model.load_state_dict(
        {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in state_dict.items()}, assign=True
    )
    model.tie_weights()
    if dtype is not None:
        model.config.dtype = dtype
    model.generation_config = generation_config
    return model.to(device), load_tokenizer(directory if is_hf else directory / TOKENIZER)


def read_info(directory: str | Path) -> dict[str, Any]:
    """checkpoint_info.json of a checkpoint folder.

    Raises:
        SurgeryError: if the folder is not there, not complete, or of a format this version does not know.
    """
    directory = Path(directory).expanduser()
    path = directory / INFO
    if directory.is_file():
        raise SurgeryError(f"{directory} is a file. Give the checkpoint's folder, here {directory.parent}.")
    if not directory.is_dir():
        raise SurgeryError(f"Checkpoint {directory} is not there. Build it with create_replaced_model_checkpoint.py.")
    if not path.is_file():
        raise SurgeryError(f"{directory} has no {INFO}, so it is not a complete checkpoint. Build it again.")
    return check_info(path)


def check_info(path: Path) -> dict[str, Any]:
    """A checkpoint_info.json, which may be outside a checkpoint.

    Raises:
        SurgeryError: if it cannot be read, or is of a format this version does not know.
    """
    try:
        info = read_json(path)
        check_fields(info, {"format_version": object, **_INFO_FIELDS})
        version = info["format_version"]
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be read ({error}). Build the checkpoint again.") from error
    if version != FORMAT_VERSION:
        raise SurgeryError(
            f"{path} has format version {version}; this program knows {FORMAT_VERSION}. Update model_preparation."
        )
    return info


def without_wrapper_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the names of the bare model: `module.` and `_orig_mod.` taken off, in any order."""
    names = {}
    for name in state_dict:
        bare = name
        while bare.startswith(_WRAPPER_PREFIXES):
            bare = bare.partition(".")[2]
        names[bare] = state_dict[name]
    return names


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, graft: GraftPlan) -> None:
    """Raise SurgeryError if the tokenizer can produce ids the model has no embedding for."""
    if len(tokenizer) > graft.config.padded_vocab_size:
        raise SurgeryError(
            f"The tokenizer in {graft.tokenizer} has {len(tokenizer)} tokens, the model {graft.config.vocab_size}. "
            "Name the model's own with --tokenizer."
        )


def _base_files(graft: GraftPlan, hf_folder: HfFolder | None, go_on: Callable[[], None]) -> dict[str, dict]:
    """{"bytes", "blake3"} of the base's files by name."""
    if hf_folder is not None:
        return hf_folder.store.base_files
    described = {}
    for path in base_paths(graft):
        go_on()
        described[path.name] = describe_source_file(path)
    return described


def _tensor_digests(graft: GraftPlan, digests: Mapping[str, str]) -> dict[str, Any]:
    """tensor_digests.json: what each tensor of the state dict is, by BLAKE3, and whose it was."""
    replaced = tuple(f"backbone.layers.{index}." for index in graft.layers)
    tied = LlambaForCausalLM._tied_weights_keys
    return {
        "format_version": FORMAT_VERSION,
        "tensors": {
            name: {
                "dtype": str(graft.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "from": "donor" if name.startswith(replaced) else "base",
                "blake3": digests.get(name) or digests[tied[name]],
            }
            for name, tensor in empty_model(graft.config).state_dict().items()
        },
    }


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise SurgeryError(f"{format!r} is not a format of checkpoints. Choose one of {', '.join(FORMATS)}.")


def _pt_bytes(graft: GraftPlan, format: str) -> int:
    return 0 if format == "hf" else 2 * graft.weight_bytes


def _writers(
    graft: GraftPlan, generation_config: dict[str, Any], hf_folder: HfFolder | None, format: str
) -> list[Callable[[Path, Advance], tuple[dict[str, dict], dict[str, str]]]]:
    """What writes the weights: each gives the files' {"bytes", "sha256"} and the tensors' BLAKE3, by their names."""
    writers: list = [] if format == "hf" else [partial(_write_pt, graft, generation_config)]
    return writers if hf_folder is None else [*writers, hf_folder.write_weights]


def _write_pt(
    graft: GraftPlan, generation_config: dict[str, Any], folder: Path, advance: Advance
) -> tuple[dict[str, dict], dict[str, str]]:
    model, sources = _with_placeholders(graft)
    model.generation_config = GenerationConfig(**generation_config)
    written = write_together({folder / MODULE: model, folder / STATE_DICT: model.state_dict()}, sources, advance)
    digests = {name: written.blake3[parameter.data_ptr()] for name, parameter in model.named_parameters()}
    return {path.name: described for path, described in written.files.items()}, digests


def _info(
    graft: GraftPlan, base_files: dict[str, dict], description: str, score: float | None, generation_config: dict
) -> dict[str, Any]:
    donor = graft.donor.metadata
    num_heads, head_dim = heads_of(graft.donor.config)
    return {
        "format_version": FORMAT_VERSION,
        "replaced_layers": graft.layers,
        "num_replaced_layers": len(graft.layers),
        "total_layers": graft.config.n_layer,
        "base_model": {
            "name": graft.base_name,
            **graft.base.as_dict(),
            "files": base_files,
        },
        "replacement_source": {
            "name": donor["model_name"],
            **donor["source"],
            "layers": {str(index): graft.donor.layers[index]["sha256"] for index in graft.layers},
        },
        "tokenizer_source": graft.tokenizer_source,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "parameters": graft.parameters,
        "dtype": str(graft.dtype).removeprefix("torch."),
        "creation_time": creation_time(),
        "description": description,
        "mmlu_score": score,
        "config": graft.config.to_dict(),
        "generation_config": generation_config,
        "versions": {
            "model_preparation": model_preparation.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def _generation_config(graft: GraftPlan, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Special tokens of the base, else of the donor, else of the tokenizer; greedy decoding unless asked otherwise."""
    given = read_generation_config(graft.base.folder) or graft.donor.metadata["generation_config"] or {}

    def token(name: str):
        value = given.get(name)
        return getattr(tokenizer, name) if value is None else value

    eos = token("eos_token_id")
    pad = token("pad_token_id")
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    return {"bos_token_id": token("bos_token_id"), "eos_token_id": eos, "pad_token_id": pad, "use_cache": True}


def _with_placeholders(graft: GraftPlan) -> tuple[LlambaForCausalLM, dict[int, TensorSource]]:
    """The grafted model with placeholders for parameters, and where the bytes of each come from."""
    model = empty_model(graft.config)
    ranges = tensor_ranges(graft)
    tensors = {name: placeholder(parameter.shape, graft.dtype) for name, parameter in model.named_parameters()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model, {tensor.data_ptr(): ranges[name].cast(graft.dtype) for name, tensor in tensors.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if not path.exists():
        raise SurgeryError(f"{path} is missing. Build the checkpoint again.")
    return load_tensors(path, "Build the checkpoint again.")


def _check_fit(model: LlambaForCausalLM, state_dict: Mapping[str, Tensor], path: Path) -> None:
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state_dict.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        name = odd[0]
        raise SurgeryError(
            f"{path} does not fit {INFO}: {len(odd)} tensors differ, {name} has shape "
            f"{list(found[name]) if name in found else 'none'} instead of "
            f"{list(wanted[name]) if name in wanted else 'none'}. Build the checkpoint again."
        )


def _progress_columns() -> list:
    return [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    ]
