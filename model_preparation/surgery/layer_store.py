"""Layers of a model in files of their own: extracted_llama_layers/.

In: a Llama (the donor) or a Llamba, as a model folder. Out: layer_NN.pt, each a plain dict of tensors; the donor's
tokenizer; rotary_emb.pt; metadata.json with where all of it came from and every file's SHA-256. One layer is in memory
at a time, and the model is never built. `LayerStore` reads such a folder and trusts no byte it has not checked.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import Any

import rich.progress
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from model_preparation.errors import SurgeryError
from model_preparation.files.digests import describe_files, fault_of
from model_preparation.files.new_folder import check_space, check_target, new_folder
from model_preparation.files.timestamps import creation_time
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer
from model_preparation.surgery.sources import has_tokenizer, resolve
from model_preparation.tensors.pt_writer import placeholder, write_together
from model_preparation.tensors.tensor_files import TensorFiles, load_tensors
from model_preparation.tensors.tensor_ranges import TensorRange, pt_ranges
from model_preparation.untrusted.tokenizer_files import load_tokenizer
from model_preparation.untrusted.untrusted_config import config_from, refusing_impossible_models
from model_preparation.untrusted.untrusted_files import check_fields, inside, read_json, regular_file

FORMAT_VERSION = 1
METADATA = "metadata.json"
ROTARY = "rotary_emb.pt"
TOKENIZER = "tokenizer"

FILE_FIELDS: dict[str, type] = {"bytes": int, "sha256": str}
_METADATA_FIELDS = {
    "model_name": str,
    "source": dict,
    "config": dict,
    "generation_config": (dict, NoneType),
    "layers": dict,
    "files": dict,
}
_LAYER_PREFIX = {"llama": "model.layers", "llamba": "backbone.layers"}


def extract_layers(
    model_name: str,
    output_dir: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the layers of a model into `output_dir` and return its metadata.

    Args:
        model_name: a name, folder or hub id, as `sources.resolve` takes it; a Llama or a Llamba.
        output_dir: the folder to make; it appears whole or not at all.
        layers: indices to extract; all by default.
        dtype: cast floating-point tensors to it; by default each keeps its own.
        overwrite: replace a complete folder that is there.
        sources: targets by name, as `resolve(overrides=...)` takes them.

    Raises:
        SurgeryError: for a model that cannot be had or is neither kind, a layer out of range or with tensors missing or
            of the wrong shape, a target that is taken or not writable, too little space on the disk.
    """
    target = Path(output_dir).expanduser()
    check_target(target, overwrite=overwrite, complete_mark=METADATA)
    source = resolve(model_name, overrides=sources)
    config = read_config(source.folder)
    if config.model_type not in _LAYER_PREFIX:
        raise SurgeryError(
            f"{source.folder} is a {config.model_type} model. Layers can be taken from a Llama or a Llamba."
        )
    total = config.num_hidden_layers
    chosen = list(range(total)) if layers is None else sorted(layers)
    check_range(chosen, total, str(source.folder))

    files = TensorFiles(source.folder)
    prefixes = {index: f"{_LAYER_PREFIX[config.model_type]}.{index}." for index in chosen}
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * total
    for index in chosen:
        for name, shape in layer_shapes(config, kinds[index]).items():
            files.require(prefixes[index] + name, shape)
    item_bytes = None if dtype is None else dtype.itemsize
    check_space(target, _bytes_of(files, tuple(prefixes.values()), item_bytes) + 50_000_000)

    with new_folder(target, overwrite=overwrite, complete_mark=METADATA) as staging:
        described = {}
        for index in rich.progress.track(chosen, f"Extracting {model_name}", disable=len(chosen) < 2):
            ranges = {
                name.removeprefix(prefixes[index]): place
                for name, place in files.ranges.items()
                # old Llama files repeat inv_freq in every layer
                if name.startswith(prefixes[index]) and not name.endswith("rotary_emb.inv_freq")
            }
            described[str(index)] = write_layer(staging / layer_file(index), ranges, dtype)
        return complete_folder(
            staging,
            config,
            described,
            model_name=model_name,
            source=source.as_dict(),
            tokenizer=source.folder if has_tokenizer(source.folder) else None,
            generation_config=read_generation_config(source.folder),
        )


def complete_folder(
    staging: Path,
    config: PreTrainedConfig,
    described: Mapping[str, dict[str, Any]],
    *,
    model_name: str,
    source: Mapping[str, Any],
    tokenizer: Path | None,
    generation_config: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put what belongs beside the layers into `staging`, metadata.json last; returns the metadata.

    Args:
        config: of the model the layers come from.
        described: by the layers' indices, as text, what `write_layer` returned.
        model_name: what the user called the model.
        source: where it came from, as `Source.as_dict` says it.
        tokenizer: the folder that has its tokenizer, if there is one.
        generation_config: the fields of its generation_config.json, if there is one.
    """
    if config.model_type == "llama":
        rotary = LlamaRotaryEmbedding(config)
        values = {"inv_freq": rotary.inv_freq, "attention_scaling": rotary.attention_scaling}
        write_together({staging / ROTARY: values}, {})  # unlike torch.save, it tells a full disk as OSError
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(staging / TOKENIZER)
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
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (staging / METADATA).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
    return metadata


def write_layer(path: Path, ranges: Mapping[str, TensorRange], dtype: torch.dtype | None) -> dict[str, Any]:
    """Write one layer's tensors, cast to `dtype` if it is given; returns the layer's entry in metadata.json."""
    tensors = {name: placeholder(place.shape, dtype or place.dtype) for name, place in ranges.items()}
    sources = {tensors[name].data_ptr(): place.cast(dtype) for name, place in ranges.items()}
    written = write_together({path: tensors}, sources)
    return {
        "file": path.name,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": _dtype_name(max(tensors.values(), key=Tensor.numel).dtype),
        "keys": sorted(tensors),
        **written.files[path],
        "tensors": {name: written.blake3[tensor.data_ptr()] for name, tensor in tensors.items()},
    }


class LayerStore:
    """A folder written by `extract_layers`.

    Attributes:
        metadata: its metadata.json.
        config: the config of the model the layers come from.

    Raises:
        SurgeryError: if there is no readable metadata.json of a format this version knows.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        path = self.folder / METADATA
        if not path.is_file() and (self.folder / "config.json").is_file():
            raise SurgeryError(
                f"{self.folder} is a model's folder. Extract its layers, and give the folder that they are in: "
                f"python extract_layers.py --model_name {self.folder} --output_dir {self.folder.absolute()}_layers"
            )
        if not path.is_file() and (old := next(self.folder.glob("*layer*.pt*"), None)):
            raise SurgeryError(
                f"{path} is missing. If {old.name} and the others are whole modules of an older program, import them: "
                f"python extract_layers.py --from_legacy {self.folder} --output_dir {self.folder.absolute()}_imported; "
                "else extract the donor's layers again."
            )
        if not path.is_file():
            raise SurgeryError(
                f"{path} is missing. Extract the donor's layers first: "
                f"python extract_layers.py --model_name llama --output_dir {self.folder}"
            )
        try:
            self.metadata: dict[str, Any] = read_json(path)
            version = self.metadata["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise SurgeryError(f"{path} is not metadata of extracted layers ({error}). {self._again()}") from error
        if version != FORMAT_VERSION:
            raise SurgeryError(
                f"{path} has format version {version}; this program knows {FORMAT_VERSION}. "
                "Update model_preparation, or extract the layers again with this version."
            )
        try:
            check_fields(self.metadata, _METADATA_FIELDS)
            self.config = config_from_dict(self.metadata["config"])
            self.layers: dict[int, dict] = {int(index): entry for index, entry in self.metadata["layers"].items()}
            for entry in [*self.layers.values(), *self.metadata["files"].values()]:
                check_fields(entry, FILE_FIELDS)
            for entry in self.layers.values():
                check_fields(entry, {"file": str})
            check_fields(self.metadata["source"], {"id": str})
        except (ValueError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{path} is damaged ({error}). {self._again()}") from error

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer, memory-mapped; call `check` before trusting them."""
        return load_tensors(self.path(index))

    def ranges(self, index: int) -> dict[str, TensorRange]:
        """Where the tensors of one layer lie in its file."""
        return pt_ranges(self.path(index), self[index])

    def path(self, index: int) -> Path:
        """Where a layer's file is.

        Raises:
            SurgeryError: if that layer was not extracted, or its file is gone.
        """
        path = self.folder / layer_file(index)
        if index not in self.layers or not path.is_file():
            raise SurgeryError(f"Layer file not found: {path}. {self._again()}")
        return regular_file(path)

    def check(self, layers: Sequence[int]) -> None:
        """Compare the files of these layers with their recorded SHA-256.

        Raises:
            SurgeryError: naming the first file that is missing, cut or changed.
        """
        paths = [self.path(index) for index in layers]
        with ThreadPoolExecutor() as readers:
            faults = readers.map(fault_of, paths, (self.layers[index] for index in layers))
            for path, fault in zip(paths, faults, strict=True):
                if fault:
                    raise SurgeryError(f"{path} is {fault}. {self._again()}")

    def faults(self) -> list[str]:
        """Check every file of the folder; one line per bad one, none if all are as they were written."""
        recorded = {entry["file"]: entry for entry in self.layers.values()} | self.metadata["files"]
        found = []
        for name, entry in rich.progress.track(recorded.items(), f"Verifying {self.folder}"):
            if fault := fault_of(inside(self.folder, name), entry):
                found.append(f"{self.folder / name} is {fault}.")
        return found

    def _again(self) -> str:
        # model_name is what the user typed; quoting a damaged file's content back would help nobody.
        metadata = getattr(self, "metadata", None)
        origin = {"model_name": "llama"} | (metadata if isinstance(metadata, dict) else {})
        # Names may have come from a stranger, and people paste commands.
        flags = f"--model_name {shlex.quote(str(origin['model_name']))}"
        if isinstance(source := origin.get("source"), dict) and source.get("legacy"):
            flags = f"--from_legacy {shlex.quote(str(source.get('path')))} --trust_pickle"
        return f"Extract it again: python extract_layers.py {flags} --output_dir {self.folder} --overwrite"


def layer_file(index: int) -> str:
    """The file name of a layer."""
    return f"layer_{index:02d}.pt"


def check_range(layers: Sequence[int], total: int, model: str) -> None:
    """Raise SurgeryError if an index lies outside a model of `total` layers, or is there twice."""
    outside = [index for index in layers if not 0 <= index < total]
    if outside:
        raise SurgeryError(
            f"Layer {', '.join(map(str, outside))} is out of range: {model} has layers 0 to {total - 1}. "
            "Choose --layers among those."
        )
    if len(set(layers)) != len(layers):
        raise SurgeryError(f"A layer is given more than once in {list(layers)}. Name each layer once.")


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a model folder, with its own errors as one sentence.

    Raises:
        SurgeryError: if config.json is not one transformers or we can read.
    """
    path = folder / "config.json"
    try:
        fields = read_json(path)
        check_fields(fields, {"model_type": str})
        if fields["model_type"] not in CONFIG_MAPPING:
            raise ValueError(f"model_type {fields['model_type']!r:.80} is unknown")
        return config_from(fields, CONFIG_MAPPING[fields["model_type"]])
    except (ValueError, FileNotFoundError) as error:
        raise SurgeryError(f"{path} cannot be used: {_sentence(error)}") from error


def config_from_dict(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config that `config.to_dict()` gave; raises ValueError for one that is neither kind, or damaged."""
    kinds = {"llama": LlamaConfig, "llamba": LlambaConfig}
    check_fields(fields, {"model_type": str})
    if fields["model_type"] not in kinds:
        raise ValueError(f"model_type {fields['model_type']!r:.80} is neither {' nor '.join(kinds)}")
    return config_from(fields, kinds[fields["model_type"]])


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The model folder's generation_config.json, or None where it has none."""
    path = folder / "generation_config.json"
    try:
        return read_json(path) if path.exists() else None
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be used: {_sentence(error)}") from error


def heads_of(config: PreTrainedConfig) -> tuple[int, int]:
    """(number of heads, head size): of a Llama's attention, or of a Llamba's values."""
    if isinstance(config, LlambaConfig):
        num_heads = config.ssm_cfg["n_v_heads"]
        return num_heads, config.d_inner // num_heads
    return config.num_attention_heads, config.head_dim


def layer_shapes(config: PreTrainedConfig, kind: str = "full_attention") -> dict[str, torch.Size]:
    """Names (relative to the layer) and shapes of a layer's parameters, worked out without memory for them.

    Args:
        config: a Llama's or a Llamba's.
        kind: one of a Llamba's `layer_types`; a Llama's layers are all alike.
    """
    with torch.device("meta"), refusing_impossible_models():
        if not isinstance(config, LlambaConfig):
            layer: torch.nn.Module = LlamaDecoderLayer(config, 0)
        elif kind == "full_attention":
            layer = LlamaDecoderLayer(config.llama_config(), 0)
        else:
            layer = LlambaDecoderLayer(config, 0)
    return {name: parameter.shape for name, parameter in layer.named_parameters()}


def _bytes_of(files: TensorFiles, prefixes: tuple[str, ...], item_bytes: int | None) -> int:
    total = 0
    for name in files.names():
        if name.startswith(prefixes):
            place = files.ranges[name]
            total += place.shape.numel() * (item_bytes or place.dtype.itemsize)
    return total


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else text + "."
