"""Writes each layer of a donor or a Llamba into a file of its own, in a folder such as extracted_llama_layers/.

The folder gets layer_NN.pt (each a plain dict of tensors), the model's tokenizer and, for a donor, rotary_emb.pt.
metadata.json names the source model and the SHA-256 of each file. Only a few blocks of bytes are in memory at a
time; the model is never loaded. layer_store.py reads such a folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.checkpoint.checkpoint_folder import write_json
from model_preparation.checkpoint.layer_store import (
    FORMAT_VERSION,
    METADATA,
    ROTARY,
    TOKENIZER,
    LlamaFiles,
    check_range,
    layer_file,
    sorted_layers,
)
from model_preparation.checkpoint.model_configs import (
    check_kind,
    heads_of,
    layer_shapes,
    read_config,
    read_generation_config,
    type_and_depth,
)
from model_preparation.creation_time import creation_time
from model_preparation.hub.sources import has_tokenizer, resolve
from model_preparation.io.background_tasks import BackgroundTasks
from model_preparation.io.block_io import Advance
from model_preparation.io.complete_folder import check_space, new_folder
from model_preparation.io.digests import describe_files
from model_preparation.io.progress import bar
from model_preparation.io.tensors.dtypes import DType, float_dtype
from model_preparation.io.tensors.pt_writer import write_dict, write_together
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.versions import versions

# torch and transformers take seconds to import, and writing does not need them.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_LAYERS_AT_ONCE = 2  # each layer's digests keep one core busy


def extract_layers(
    model_name: str,
    output_dir: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: "torch.dtype | str | None" = None,
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the layers of a model into `output_dir`; returns the folder's metadata.

    Args:
        model_name: a name, folder or hub id of a donor or a Llamba, as `sources.resolve` takes it.
        output_dir: the folder to make; it appears whole or not at all.
        layers: indices to extract; all by default.
        dtype: cast floating-point tensors to this dtype; by default each tensor keeps its own.
        overwrite: replace an existing complete folder.
        sources: folders or hub ids by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: if the model is missing, or is neither a donor nor a Llamba; if a layer is out of range or has
            wrong tensors; if output_dir or the disk cannot be used.
    """
    cast_to = float_dtype(dtype)
    target = Path(output_dir).expanduser()
    with new_folder(target, overwrite=overwrite, marker_file=METADATA) as staging:
        source = resolve(model_name, overrides=sources)
        model_type, total = type_and_depth(source.folder)
        is_llamba = model_type == "llamba"
        if not is_llamba:
            check_kind(model_type, f"{source.folder} is")
        chosen = sorted_layers(range(total) if layers is None else layers)
        check_range(chosen, total, str(source.folder))
        files = TensorFiles(source.folder) if is_llamba else LlamaFiles(source.folder)
        prefix = "backbone.layers" if is_llamba else "model.layers"
        ranges = {index: _layer_ranges(files, f"{prefix}.{index}.") for index in chosen}
        places = [place for layer in ranges.values() for place in layer.values()]
        check_space(target, sum(place.numel * (cast_to or place.dtype).itemsize for place in places) + 50_000_000)
        with BackgroundTasks(1 + _LAYERS_AT_ONCE) as tasks:
            # The check imports torch and transformers, which takes as long as writing some GB: do both at once.
            checking = tasks.start(_check_and_load, source.folder, files, chosen, prefix)
            writing = {
                str(index): tasks.start(
                    write_layer, staging / layer_file(index), layer, cast_to, lambda _: tasks.check()
                )
                for index, layer in ranges.items()
                if layer  # _check_and_load reports missing layers
            }
            described = {}
            with bar(f"Extracting {model_name}", len(writing)) as advance:
                for name, layer_writing in writing.items():
                    described[name] = layer_writing.result()
                    advance(1)
            config, tokenizer = checking.result()
        return complete_folder(
            staging,
            config,
            tokenizer,
            described,
            model_name=model_name,
            source=source.as_dict(),
            generation_config=read_generation_config(source.folder),
        )


def _layer_ranges(files: TensorFiles, prefix: str) -> dict[str, TensorRange]:
    return {
        name.removeprefix(prefix): place
        for name, place in files.ranges.items()
        if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")  # old Llama files have it
    }


def _check_and_load(
    folder: Path, files: TensorFiles, layers: Sequence[int], prefix: str
) -> "tuple[PreTrainedConfig, PreTrainedTokenizerBase | None]":
    """The model's config, and its tokenizer if it has one; raises SurgeryError if the layers do not fit the config."""
    from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

    config = read_config(folder)
    for index in layers:
        for name, shape in layer_shapes(config, index).items():
            files.require(f"{prefix}.{index}.{name}", shape)
    return config, load_tokenizer(folder) if has_tokenizer(folder) else None


def complete_folder(
    staging: Path,
    config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase | None",
    described: Mapping[str, dict[str, Any]],
    *,
    model_name: str,
    source: Mapping[str, Any],
    generation_config: dict[str, Any] | None,
) -> dict[str, Any]:
    """Add all other files to the layers in `staging`, metadata.json last; returns the metadata.

    Args:
        config: the config of the layers' model.
        tokenizer: the model's tokenizer; None if it has none.
        described: the entries that `write_layer` returned, by the layer's index as text.
        model_name: the user's name for the model.
        source: the model's `Source.as_dict()`.
        generation_config: the fields of the model's generation_config.json; None if it has none.
    """
    if config.model_type in KINDS:
        from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models

        with refusing_impossible_models():
            rotary = KINDS[config.model_type].transformers_class("RotaryEmbedding")(config)
        content = {"inv_freq": rotary.inv_freq, "attention_scaling": rotary.attention_scaling}
        # Not torch.save: it raises no OSError when the disk is full.
        write_together([staging / ROTARY], {}, lambda _: [content])
    if tokenizer is not None:
        tokenizer.save_pretrained(staging / TOKENIZER)
    num_heads, head_dim = heads_of(config)
    metadata = {
        "format_version": FORMAT_VERSION,
        "model_name": model_name,
        "source": source,
        "config": config.to_dict(),
        "generation_config": generation_config,
        "total_layers": config.num_hidden_layers,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "dtype": next(iter(described.values()))["dtype"],
        "layers": described,
        "files": describe_files(staging, excluded={entry["file"] for entry in described.values()}),
        "extraction_time": creation_time(),
        "versions": versions(),
    }
    write_json(staging / METADATA, metadata)
    return metadata


def write_layer(
    path: Path,
    ranges: Mapping[str, TensorRange],
    dtype: DType | None,
    advance: Advance = lambda size_bytes: None,
) -> dict[str, Any]:
    """Write one layer's tensors, cast to `dtype` if it is given; returns the layer's entry for metadata.json.

    Args:
        advance: called with the size in bytes of each written piece; may raise an exception.
    """
    described, blake3 = write_dict(path, {name: place.cast(dtype) for name, place in ranges.items()}, advance)
    largest = max(ranges.values(), key=lambda place: place.numel)
    return {
        "file": path.name,
        "parameters": sum(place.numel for place in ranges.values()),
        "dtype": (dtype or largest.dtype).name,
        "keys": sorted(ranges),
        **described,
        "tensors": blake3,
    }
