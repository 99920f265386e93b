"""The checkpoint folder, written whole or not at all.

In: `GraftParts`. Out: model_checkpoints/NAME/ with the weights (pt_folder.py, hf_folder.py, or both), the tokenizer,
README.txt, tensor_digests.json; and checkpoint_info.json, which is written last: a folder without it is no checkpoint.
checkpoint_loading.py opens it. The weights are written while torch and transformers are imported, which check the graft
and try it out beside that; where they find a fault, what is written goes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from model_preparation.checkpoint.checkpoint_info import (
    FORMAT_VERSION,
    FORMATS,
    INFO,
    MODULE,
    README,
    STATE_DICT,
    TENSOR_DIGESTS,
    TOKENIZER,
    check_format,
)
from model_preparation.checkpoint.graft_parts import GraftParts, find_parts
from model_preparation.checkpoint.hf_folder import HfFolder
from model_preparation.checkpoint.model_code import code_digests
from model_preparation.checkpoint.model_configs import heads_of, read_generation_config
from model_preparation.checkpoint.pt_folder import PtFolder
from model_preparation.checkpoint.store_folder import STORE
from model_preparation.devices import check_device
from model_preparation.errors import SurgeryError
from model_preparation.io.background_tasks import BackgroundTasks
from model_preparation.io.complete_folder import check_space, check_target, new_folder
from model_preparation.io.digests import describe_files, describe_source_file
from model_preparation.io.progress import bar
from model_preparation.io.self_checksum import with_checksum
from model_preparation.versions import creation_time, versions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from model_preparation.checkpoint.graft import GraftPlan
    from model_preparation.llamba import LlambaForCausalLM

_SMALL_FILES_BYTES = 64_000_000  # tokenizer, JSON and README, generously


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
    dtype: "torch.dtype | str | None" = None,
    format: str = "pt",
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Replace `layers` of `base` by the donor's and write the checkpoint; returns its checkpoint_info.json.

    The arguments are those of `find_parts`, `graft.check` and `write`.

    Raises:
        SurgeryError: for anything that makes the graft impossible or wrong; nothing is left on the disk then.
    """
    check_format(format)
    check_target(Path(output_dir).expanduser(), overwrite=overwrite, marker_file=INFO)
    return write(
        find_parts(base, layers, llama_layers_dir, dtype=dtype, sources=sources),
        output_dir,
        tokenizer=tokenizer,
        sources=sources,
        description=description,
        score=score,
        device=device,
        format=format,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class _Checked:
    """A graft whose checks have passed, with what needed torch and transformers to be known."""

    graft: "GraftPlan"
    tokenizer: "PreTrainedTokenizerBase"
    generation_config: dict[str, Any]
    device: str

    def model(self, tensors: "dict[str, Tensor]") -> "LlambaForCausalLM":
        """The grafted model with these parameters."""
        from transformers import GenerationConfig

        from model_preparation.checkpoint.graft import empty_model

        model = empty_model(self.graft.config)
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(**self.generation_config)
        return model


def write(
    graft: GraftParts,
    output_dir: str | Path,
    *,
    tokenizer: str | None = None,
    sources: Mapping[str, str] | None = None,
    show: "Callable[[GraftPlan], None]" = lambda graft: None,
    description: str = "",
    score: float | None = None,
    measured: Mapping[str, Any] | None = None,
    device: str | Callable[[], str] = "cpu",
    format: str = "pt",
    overwrite: bool = False,
    confirm: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Graft, try the model once on `device`, and write the folder; returns its checkpoint_info.json.

    Args:
        output_dir: appears whole or not at all.
        tokenizer: as `graft.check` takes it, and so are `sources`.
        show: called with the plan as soon as it is checked.
        description: free text for people.
        score: an MMLU score known beforehand, as a fraction of 1.
        measured: `mmlu_result` of a checkpoint, if that score was measured; of other weights, no score is entered.
        device: where the trial forward pass runs, or a function that chooses it; what is written is always on the CPU.
        format: "pt" for model.pt and model_state_dict.pt, "hf" for what transformers opens without this package (see
            hf_folder.py; the shards of untouched layers are shared with the checkpoints beside it), or "both".
        overwrite: replace a checkpoint that is there; it stays whole until the new one is.
        confirm: called with the new checkpoint_info.json before anything is put in place; may raise.

    Raises:
        SurgeryError: for anything that makes the graft impossible or wrong; if the target is taken or not writable,
            the disk too small, the device not to be had, the score none, or the trial's logits not finite.
    """
    check_format(format)
    if score is not None and not 0 <= score <= 1:
        raise SurgeryError(f"The score {score} is not between 0 and 1. Give a fraction, such as 0.57.")
    target = Path(output_dir).expanduser()
    with new_folder(target, overwrite=overwrite, marker_file=INFO) as staging:
        with BackgroundTasks() as tasks:

            def check() -> _Checked:
                checked = _checked(graft, tokenizer, sources, device)
                show(checked.graft)
                return checked

            def read_base() -> dict[str, dict]:
                checking.result()  # imports come first: without them nothing can be finished
                return _base_files(graft, tasks.check)

            checking = tasks.start(check)
            trial = tasks.start(_try_out, checking, tasks.check)
            try:
                pt_folder = None if format == "hf" else PtFolder(graft, target)
                hf_folder = None if format == "pt" else HfFolder(graft, target.resolve().parent)
                shares = pt_folder is not None and pt_folder.wants_base_files
                if shares:
                    checking.result()  # siblings are read with torch, which two threads cannot import at once
                check_room(graft, target, format)
            except SurgeryError:
                checking.result()  # what that finds comes first
                raise
            base_files: dict[str, dict] | Future[dict[str, dict]]
            if hf_folder is not None:
                base_files = hf_folder.store.base_files
            else:
                base_files = _base_files(graft, tasks.raise_failure) if shares else tasks.start(read_base)
            if pt_folder is not None and shares and not isinstance(base_files, Future):
                pt_folder.take_from_siblings(base_files)
            files: dict[str, dict] = {}
            digests: dict[str, str] = {}
            with bar("Writing", FORMATS[format] * graft.weight_bytes, in_bytes=True) as draw:

                def advance(size_bytes: int) -> None:
                    draw(size_bytes)
                    tasks.raise_failure()

                if pt_folder is not None:
                    files, digests = pt_folder.write_weights(
                        staging, lambda tensors: checking.result().model(tensors), advance
                    )
                if hf_folder is not None:
                    shards, digests = hf_folder.write_weights(staging, advance)
                    files |= shards
            checked = checking.result()
            trial.result()
            if isinstance(base_files, Future):
                base_files = base_files.result()
        if format != "hf":
            checked.tokenizer.save_pretrained(staging / TOKENIZER)
        if hf_folder is not None:
            hf_folder.write_rest(staging, checked.graft, checked.tokenizer, checked.generation_config)
        _write_json(staging / TENSOR_DIGESTS, _tensor_digests(checked.graft, digests))
        info = _info(checked.graft, base_files, description, score, checked.generation_config)
        info |= {"format": format, "files": files}
        info["digests"] = _digests(staging, checked)
        if measured is not None:
            is_of_these = measured.get("model", {}).get("weights") == info["digests"]["weights"]
            info |= {"mmlu_result": dict(measured)} if is_of_these else {"mmlu_score": None}
        from model_preparation.checkpoint.checkpoint_readme import readme_text  # which needs transformers

        (staging / README).write_text(readme_text(info), encoding="utf-8")
        info["files"] |= describe_files(staging, excluded=info["files"])
        data = with_checksum(info)
        if confirm is not None:
            confirm(info)
        (staging / INFO).write_bytes(data)
    return json.loads(data)


def _checked(
    parts: GraftParts,
    tokenizer: str | None,
    sources: Mapping[str, str] | None,
    device: str | Callable[[], str],
) -> _Checked:
    """Everything that can be wrong with a graft but its numbers."""
    from model_preparation.checkpoint import graft
    from model_preparation.io.untrusted.tokenizer_files import load_tokenizer

    chosen = device if isinstance(device, str) else device()
    check_device(chosen)
    planned = graft.check(parts, tokenizer=tokenizer, sources=sources)
    loaded = load_tokenizer(planned.tokenizer)
    check_tokenizer(loaded, planned)
    return _Checked(planned, loaded, _generation_config(planned, loaded), chosen)


def _try_out(checking: Future[_Checked], go_on: Callable[[], object]) -> None:
    checked = checking.result()
    from model_preparation.checkpoint.trial import try_out

    try_out(checked.graft, checked.tokenizer, checked.device, go_on)


def check_room(graft: GraftParts, output_dir: Path, format: str = "pt") -> None:
    """Raise SurgeryError if the disk `output_dir` will be on is too small for what will be written there."""
    try:
        check_space(output_dir, _SMALL_FILES_BYTES + _bytes_to_write(graft, output_dir, format, read_base=False))
    except SurgeryError:  # unless most of it is there already, which to know may take reading the base
        check_space(output_dir, _SMALL_FILES_BYTES + _bytes_to_write(graft, output_dir, format, read_base=True))


def describe_writing(graft: GraftParts, output_dir: Path, format: str) -> str:
    """What `write` will write, in a line to print."""
    size = decimal(_bytes_to_write(graft, output_dir, format, read_base=False))
    if format == "pt":
        return f"to write   {size} in {MODULE} and {STATE_DICT}"
    return f"to write   {size}; shards of the base that {STORE} beside the checkpoint holds are shared"


def _bytes_to_write(graft: GraftParts, output_dir: Path, format: str, *, read_base: bool) -> int:
    """What will be written of the weights, in bytes; without reading the base, at most that."""
    size_bytes = 0
    if format != "hf":
        pt_folder = PtFolder(graft, output_dir)
        if read_base and pt_folder.wants_base_files:
            pt_folder.take_from_siblings(_base_files(graft))
        size_bytes += pt_folder.bytes_to_write
    if format != "pt":
        size_bytes += HfFolder(graft, output_dir.resolve().parent).bytes_to_write(read_base=read_base)
    return size_bytes


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", graft: "GraftPlan") -> None:
    """Raise SurgeryError if the tokenizer can produce ids the model has no embedding for."""
    if len(tokenizer) > graft.config.padded_vocab_size:
        raise SurgeryError(
            f"The tokenizer in {graft.tokenizer} has {len(tokenizer)} tokens, the model {graft.config.vocab_size}. "
            "Name the model's own with --tokenizer."
        )


def _base_files(graft: GraftParts, go_on: Callable[[], None] = lambda: None) -> dict[str, dict]:
    """{"bytes", "blake3"} of the base's files by name."""
    described = {}
    for path in graft.base_paths:
        go_on()
        described[path.name] = describe_source_file(path)
    return described


def _tensor_digests(graft: "GraftPlan", digests: Mapping[str, str]) -> dict[str, Any]:
    """tensor_digests.json: what each tensor of the state dict is, by BLAKE3, and whose it was."""
    from model_preparation.checkpoint.graft import empty_model
    from model_preparation.llamba import LlambaForCausalLM

    replaced = tuple(f"backbone.layers.{index}." for index in graft.layers)
    tied = LlambaForCausalLM._tied_weights_keys
    return {
        "format_version": FORMAT_VERSION,
        "tensors": {
            name: {
                "dtype": graft.dtype.name,
                "shape": list(tensor.shape),
                "from": "donor" if name.startswith(replaced) else "base",
                "blake3": digests.get(name) or digests[tied[name]],
            }
            for name, tensor in empty_model(graft.config).state_dict().items()
        },
    }


def _digests(staging: Path, checked: _Checked) -> dict[str, Any]:
    """What the model is, whatever its files and its folder are called."""
    from model_preparation.checkpoint.model_digests import digest_of_layers, digest_of_tokenizer, recorded_weights

    return {
        "weights": recorded_weights(staging),
        "donor_layers": digest_of_layers(checked.graft.donor, checked.graft.layers),
        "tokenizer": digest_of_tokenizer(checked.tokenizer),
    }


def _info(
    graft: "GraftPlan", base_files: dict[str, dict], description: str, score: float | None, generation_config: dict
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
        "dtype": graft.dtype.name,
        "creation_time": creation_time(),
        "description": description,
        "mmlu_score": score,
        "config": graft.config.file_fields(),
        "generation_config": generation_config,
        "versions": versions(),
        "code": code_digests(),
    }


def _generation_config(graft: "GraftPlan", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
