"""Imports old layer files: pickled LlamaDecoderLayer modules, one per file. The result is as from `extract_layers`.

If the user does not trust the files, they are never unpickled, only searched for the names of their globals. If the
user trusts them, another process reads them (`reader_process`). Its answers are compared with the donor's config.
"""

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model_preparation.checkpoint.extract import complete_folder, write_layer
from model_preparation.checkpoint.layer_store import (
    METADATA,
    TOKENIZER,
    check_range,
    layer_file,
    sorted_layers,
)
from model_preparation.checkpoint.model_configs import (
    config_from_dict,
    layer_shapes,
    read_config,
    read_generation_config,
)
from model_preparation.errors import SurgeryError, one_line
from model_preparation.hub.sources import has_tokenizer, resolve
from model_preparation.io.complete_folder import check_space, check_target, new_folder
from model_preparation.io.digests import describe_file
from model_preparation.io.progress import bar
from model_preparation.io.tensors.dtypes import float_dtype
from model_preparation.io.tensors.tensor_ranges import MappedFiles, TensorRange
from model_preparation.io.untrusted.pickle_check import globals_in
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.legacy.reader import is_usual
from model_preparation.legacy.reader_process import legacy_process

# The layer's index is the number after "layer", or the only number in the name.
_LAYER_NAME = re.compile(r"(?:.*layer\D*(\d+)(?:\D.*)?|\D*(\d+)\D*)\.(?:pt|pth|bin)", re.IGNORECASE)
_ROTARY = "self_attn.rotary_emb."
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# A graft computes with these fields. All configs of one model have equal values here.
_COMPARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
)


def import_legacy(
    folder: str | Path,
    output_dir: str | Path,
    *,
    trust_pickle: bool = False,
    allow_network: bool = False,
    model_name: str | None = None,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the layers pickled in `folder` into `output_dir`; returns the metadata of `output_dir`.

    Args:
        folder: a folder with one file per layer; the name of the file has the layer's index.
        output_dir: the folder to make; it appears whole or not at all.
        trust_pickle: whether the files may be unpickled at all.
        allow_network: unpickle them even if the reading process keeps its network access.
        model_name: the donor, for `sources.resolve`; needed if the pickled modules have no config. If `folder` has no
            tokenizer, the donor's is taken. Only config.json and the tokenizer are fetched.
        layers: indices to import; by default all.
        dtype: cast floating-point tensors to this dtype; by default each tensor keeps its own.
        overwrite: replace a complete folder.
        sources: folders or hub ids by name, for `resolve(overrides=...)`.

    Returns:
        The metadata, as from `extract_layers`. Its "source" also has "legacy": true, "files" with every old file's size
        and SHA-256, and "not_run": the globals in the files that no decoder layer needs.

    Raises:
        SurgeryError: without `trust_pickle` (the error lists the files' globals); if the files are not decoder layers
            of one Llama, or differ from the config in a name, a shape or a setting; and as `extract_layers`.
    """
    folder, target = Path(folder).expanduser(), Path(output_dir).expanduser()
    cast_to = float_dtype(dtype)
    check_target(target, overwrite=overwrite, marker_file=METADATA)
    paths = legacy_files(folder)
    chosen = sorted_layers(paths if layers is None else layers)
    if missing := [index for index in chosen if index not in paths]:
        raise SurgeryError(
            f"{folder} has no file for layer {', '.join(map(str, missing))}; it has {', '.join(map(str, paths))}. "
            "Choose --layers from these."
        )
    named = set().union(*(globals_in(paths[index]) for index in chosen))
    if not trust_pickle:
        raise _not_trusted(folder, target, named)
    donor = None if model_name is None else _donor_folder(model_name, sources)
    config = None if donor is None else read_config(donor)
    if config is not None and config.model_type != "llama":
        raise SurgeryError(f"{donor} is a {config.model_type} model. Only layers of a Llama can be imported.")

    with new_folder(target, overwrite=overwrite, marker_file=METADATA) as staging:
        described: dict[str, dict[str, Any]] = {}
        not_run: set[str] = set()
        with (
            tempfile.TemporaryDirectory(dir=staging) as between,
            legacy_process(Path(between), allow_network) as process,
            bar(f"Importing {folder}", len(chosen)) as advance,
        ):
            for index in chosen:
                ranges, answer = process.read(paths[index].resolve())
                not_run |= {*answer["not_run"]}
                config = _agreed_config(config, answer["config"], paths[index])
                _check(paths[index], index, config, ranges, answer)
                own = {name: place for name, place in ranges.items() if not name.startswith(_ROTARY)}
                if not described:
                    check_range(chosen, config.num_hidden_layers, "the donor")
                    layer_bytes = sum(place.numel * (cast_to or place.dtype).itemsize for place in own.values())
                    check_space(target, len(chosen) * layer_bytes + 50_000_000)
                described[str(index)] = write_layer(staging / layer_file(index), own, cast_to)
                advance(1)
        assert config is not None
        tokenizers = [place for place in (folder / TOKENIZER, folder, donor) if place and has_tokenizer(place)]
        return complete_folder(
            staging,
            config,
            load_tokenizer(tokenizers[0]) if tokenizers else None,
            described,
            model_name=model_name or str(folder),
            source={
                "hub": "local",
                "id": folder.resolve().name,
                "revision": None,
                "path": str(folder.absolute()),
                "legacy": True,
                "not_run": sorted(not_run),
                "files": {paths[index].name: describe_file(paths[index]) for index in chosen},
            },
            generation_config=read_generation_config(donor or folder),
        )


def legacy_files(folder: Path) -> dict[int, Path]:
    """The layer files in `folder` by the index in their names: layer_11.pt, llama_layer_11.pth, 11.pt.

    Raises:
        SurgeryError: if there is no layer file, or there are two for one layer.
    """
    if not folder.is_dir():
        raise SurgeryError(f"{folder} is not a folder. Give the folder of the old layer files.")
    if (folder / METADATA).is_file():
        raise SurgeryError(f"{folder} holds {METADATA}: its layers need no import. Give it as --llama_layers_dir.")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _LAYER_NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        index = int(match[1] or match[2])
        if index in found:
            raise SurgeryError(f"{found[index]} and {path} are both for layer {index}. Move one of them away.")
        found[index] = path
    if not found:
        raise SurgeryError(f"{folder} has no layer files such as layer_11.pt. Give the folder of the old layer files.")
    return dict(sorted(found.items()))


def _not_trusted(folder: Path, target: Path, named: set[str]) -> SurgeryError:
    # Unusual globals come first: the user needs them to decide about trust.
    ordered = sorted(named, key=lambda name: (is_usual(name), "DecoderLayer" not in name, name))
    listed = ", ".join(ordered[:6]) + (f" and {len(ordered) - 6} more" if len(ordered) > 6 else "")
    return SurgeryError(
        f"The files in {folder} are pickled modules, which can run code when they are opened. They name {listed}. If "
        "you trust their maker, import them in a separate process without network: "
        f"python extract_layers.py --from_legacy {shlex.quote(str(folder))} --output_dir {shlex.quote(str(target))} "
        "--trust_pickle"
    )


def _donor_folder(model_name: str, sources: Mapping[str, str] | None) -> Path:
    given = Path(model_name).expanduser()
    if (given / "config.json").is_file():
        return given
    return resolve(model_name, need="tokenizer", overrides=sources).folder


def _agreed_config(known: LlamaConfig | None, fields: dict[str, Any] | None, path: Path) -> LlamaConfig:
    """The donor's config: `known`, or one with a file's `fields` if none is known. Two configs must agree."""
    if fields is None:
        if known is None:
            raise SurgeryError(
                f"{path} has no config in it. Name its model with --model_name NAME|PATH. "
                "The model's weights are not read."
            )
        return known
    fields_known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling", "torch_dtype"}
    try:
        if lacking := [name for name in _NEEDED if name not in fields]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        found = config_from_dict(
            {name: fields[name] for name in fields_known & fields.keys()} | {"model_type": "llama"}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"The config in {path} cannot be used ({one_line(error)}). Name the model with --model_name."
        ) from error
    if known is None:
        return found
    for name in _COMPARED:
        ours, theirs = getattr(known, name), getattr(found, name)
        if ours != theirs:
            raise SurgeryError(
                f"{path} comes from a model with {name} {theirs!r}; the other files or --model_name say {ours!r}. "
                "Import only the layers of one model."
            )
    return known


def _check(
    path: Path, index: int, config: LlamaConfig, ranges: Mapping[str, TensorRange], answer: dict[str, Any]
) -> None:
    """Compare names, shapes and the module's settings with the config."""
    wanted: dict[str, Any] = layer_shapes(config)
    found = {name: place.shape for name, place in ranges.items() if not name.startswith(_ROTARY)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            shapes = [list(shapes[name]) if name in shapes else "absent" for shapes in (found, wanted)]
            raise SurgeryError(
                f"{name} in {path} is {shapes[0]}, but by the donor's config it must be {shapes[1]}. "
                "Check that the file is of this donor."
            )
    settings = {
        "layer_idx": index,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "rope_theta": config.rope_parameters.get("rope_theta"),
        "epsilon": config.rms_norm_eps,
    }
    for name, value in (answer["attention"] | {"epsilon": answer["eps"]}).items():
        if value is not None and name in settings and value != settings[name]:
            raise SurgeryError(
                f"The layer in {path} has {name} {value!r}, but by its file's name and the donor's config it "
                f"must be {settings[name]!r}. Check that the file is of this donor."
            )
    if (place := ranges.get(f"{_ROTARY}inv_freq")) is not None:
        ours = LlamaRotaryEmbedding(config).inv_freq
        theirs = MappedFiles().tensor(place).float()
        # The tolerance is large, because models cast to bfloat16 have these numbers in bfloat16 too.
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0.02, atol=0):
            raise SurgeryError(
                f"The layer in {path} has other rotary frequencies than the donor's config gives "
                f"({theirs[-1].item():.3g} instead of {ours[-1].item():.3g}). Name the right model with --model_name."
            )
