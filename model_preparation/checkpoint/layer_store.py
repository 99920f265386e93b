"""Layers of a model in files of their own: extracted_llama_layers/.

In: a Llama (the donor) or a Llamba, as a model folder. Out: layer_NN.pt, each a plain dict of tensors; the donor's
tokenizer; rotary_emb.pt; metadata.json with where all of it came from and every file's SHA-256. A few blocks are in
memory at a time, and the model is never built. `LayerStore` reads such a folder and trusts no byte it has not checked.
"""

import json
import operator
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, SupportsIndex

from model_preparation.checkpoint.llama_files import LlamaFiles
from model_preparation.checkpoint.model_configs import (
    config_from_dict,
    heads_of,
    layer_shapes,
    read_config,
    read_generation_config,
    type_and_depth,
)
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import check_recorded, has_tokenizer, resolve
from model_preparation.io.background_tasks import BackgroundTasks
from model_preparation.io.block_io import Advance
from model_preparation.io.complete_folder import check_space, check_target, new_folder
from model_preparation.io.digests import FILE_FIELDS, describe_files, fault_of
from model_preparation.io.progress import bar
from model_preparation.io.tensors.dtypes import DType, float_dtype
from model_preparation.io.tensors.pt_dict import dict_ranges
from model_preparation.io.tensors.pt_writer import write_dict, write_together
from model_preparation.io.tensors.tensor_files import TensorFiles
from model_preparation.io.tensors.tensor_ranges import TensorRange
from model_preparation.io.untrusted.not_a_model import what_it_is
from model_preparation.io.untrusted.untrusted_files import check_fields, inside, read_json, regular_file
from model_preparation.versions import creation_time, versions

# torch and transformers are imported where they are used: seconds that writing does not wait for.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FORMAT_VERSION = 1
METADATA = "metadata.json"
ROTARY = "rotary_emb.pt"
TOKENIZER = "tokenizer"

_METADATA_FIELDS = {
    "model_name": str,
    "source": dict,
    "config": dict,
    "generation_config": (dict, NoneType),
    "layers": dict,
    "files": dict,
}
_LAYERS_AT_ONCE = 2  # each is hashed by one core
_LAYER_PREFIX = {"llama": "model.layers", "llamba": "backbone.layers"}


def extract_layers(
    model_name: str,
    output_dir: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: "torch.dtype | str | None" = None,
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
    cast_to = float_dtype(dtype)
    check_target(target, overwrite=overwrite, marker_file=METADATA)
    source = resolve(model_name, overrides=sources)
    model_type, total = type_and_depth(source.folder)
    if model_type not in _LAYER_PREFIX:
        raise SurgeryError(f"{source.folder} is a {model_type} model. Layers can be taken from a Llama or a Llamba.")
    chosen = sorted_layers(range(total) if layers is None else layers)
    check_range(chosen, total, str(source.folder))
    files = LlamaFiles(source.folder) if model_type == "llama" else TensorFiles(source.folder)
    prefixes = {index: f"{_LAYER_PREFIX[model_type]}.{index}." for index in chosen}
    item_bytes = None if cast_to is None else cast_to.itemsize
    check_space(target, _bytes_of(files, tuple(prefixes.values()), item_bytes) + 50_000_000)

    with new_folder(target, overwrite=overwrite, marker_file=METADATA) as staging:
        with BackgroundTasks(1 + _LAYERS_AT_ONCE) as tasks:

            def go_on(_size_bytes: int) -> None:
                tasks.check()
                tasks.raise_failure()

            # Importing torch and transformers takes as long as writing some GB: the config is checked meanwhile.
            checking = tasks.start(_checked_parts, source.folder, files, prefixes)
            writing = {}
            for index, prefix in prefixes.items():
                ranges = {
                    name.removeprefix(prefix): place
                    for name, place in files.ranges.items()
                    # old Llama files repeat inv_freq in every layer
                    if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
                }
                if ranges:
                    path = staging / layer_file(index)
                    writing[str(index)] = tasks.start(write_layer, path, ranges, cast_to, go_on)
            described = {}
            with bar(f"Extracting {model_name}", len(writing)) as advance:
                for number, layer in writing.items():
                    described[number] = layer.result()
                    advance(1)
            parts = checking.result()
        return complete_folder(
            staging,
            parts,
            described,
            model_name=model_name,
            source=source.as_dict(),
            generation_config=read_generation_config(source.folder),
        )


def _checked_parts(folder: Path, files: TensorFiles, prefixes: Mapping[int, str]) -> "ModelParts":
    """What goes beside the layers; raises SurgeryError if the config is none, or asks for other tensors in a layer."""
    config = read_config(folder)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for index, prefix in prefixes.items():
        for name, shape in layer_shapes(config, kinds[index]).items():
            files.require(prefix + name, shape)
    return ModelParts.of(config, folder if has_tokenizer(folder) else None)


@dataclass(frozen=True)
class ModelParts:
    """What a folder of layers has of their model besides the layers.

    Attributes:
        config: the model's.
        tokenizer: the model's, if there is one.
        rotary: what rotary_emb.pt will hold, of a Llama.
    """

    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase | None"
    rotary: dict[str, Any] | None

    @classmethod
    def of(cls, config: "PreTrainedConfig", tokenizer: Path | None) -> "ModelParts":
        """Read the tokenizer from its folder, if there is one, and work out the rest."""
        from model_preparation.io.untrusted.tokenizer_files import load_tokenizer

        loaded = None if tokenizer is None else load_tokenizer(tokenizer)
        if config.model_type != "llama":
            return cls(config, loaded, None)
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        from model_preparation.io.untrusted.untrusted_config import refusing_impossible_models

        with refusing_impossible_models():
            rotary = LlamaRotaryEmbedding(config)
        return cls(config, loaded, {"inv_freq": rotary.inv_freq, "attention_scaling": rotary.attention_scaling})


def complete_folder(
    staging: Path,
    parts: ModelParts,
    described: Mapping[str, dict[str, Any]],
    *,
    model_name: str,
    source: Mapping[str, Any],
    generation_config: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put what belongs beside the layers into `staging`, metadata.json last; returns the metadata.

    Args:
        parts: of the model the layers come from.
        described: by the layers' indices, as text, what `write_layer` returned.
        model_name: what the user called the model.
        source: where it came from, as `Source.as_dict` says it.
        generation_config: the fields of its generation_config.json, if there is one.
    """
    config = parts.config
    if parts.rotary is not None:
        write_together([staging / ROTARY], {}, lambda _: [parts.rotary])  # torch.save tells no full disk as OSError
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(staging / TOKENIZER)
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
    (staging / METADATA).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
    return metadata


def write_layer(
    path: Path,
    ranges: Mapping[str, TensorRange],
    dtype: DType | None,
    advance: Advance = lambda size_bytes: None,
) -> dict[str, Any]:
    """Write one layer's tensors, cast to `dtype` if it is given; returns the layer's entry in metadata.json.

    Args:
        advance: told the bytes of every piece written; may raise.
    """
    written = write_dict(path, {name: place.cast(dtype) for name, place in ranges.items()}, advance)
    largest = max(ranges.values(), key=lambda place: place.numel)
    return {
        "file": path.name,
        "parameters": sum(place.numel for place in ranges.values()),
        "dtype": (dtype or largest.dtype).name,
        "keys": sorted(ranges),
        **written.files[path],
        "tensors": written.blake3,
    }


class LayerStore:
    """A folder written by `extract_layers`.

    Args:
        hint: the model that an error advises to extract; None if nobody knows.

    Attributes:
        metadata: its metadata.json.

    Raises:
        SurgeryError: if there is no readable metadata.json of a format this version knows.
    """

    def __init__(self, folder: str | Path, hint: str | None = "llama"):
        self.folder = Path(folder).expanduser()
        path = self.folder / METADATA
        if not path.is_file():
            raise SurgeryError(_without_metadata(self.folder, hint))
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
            self.layers: dict[int, dict] = {int(index): entry for index, entry in self.metadata["layers"].items()}
            for entry in [*self.layers.values(), *self.metadata["files"].values()]:
                check_fields(entry, FILE_FIELDS)
            for entry in self.layers.values():
                check_fields(entry, {"file": str})
            check_recorded(self.metadata["source"])
        except (ValueError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{path} is damaged ({error}). {self._again()}") from error

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The config of the model the layers come from.

        Raises:
            SurgeryError: if it describes no Llama or Llamba.
        """
        try:
            return config_from_dict(self.metadata["config"])
        except (ValueError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{self.folder / METADATA} is damaged ({error}). {self._again()}") from error

    @property
    def tokenizer(self) -> Path:
        """Where the donor's tokenizer is, if it has one."""
        return self.folder / TOKENIZER

    def ranges(self, index: int) -> dict[str, TensorRange]:
        """Where the tensors of one layer lie in its file; call `check` before trusting them."""
        return dict_ranges(self.path(index), self._again())

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
        with bar(f"Verifying {self.folder}", len(recorded)) as advance:
            for name, entry in recorded.items():
                if fault := fault_of(inside(self.folder, name), entry):
                    found.append(f"{self.folder / name} is {fault}.")
                advance(1)
        return found

    def _again(self) -> str:
        # model_name is what the user typed; quoting a damaged file's content back would help nobody.
        metadata = getattr(self, "metadata", None)
        origin = {"model_name": "llama"} | (metadata if isinstance(metadata, dict) else {})
        # Names may have come from a stranger, and people paste commands.
        flags = f"--model_name {shlex.quote(str(origin['model_name']))}"
        if isinstance(source := origin.get("source"), dict) and source.get("legacy"):
            flags = f"--from_legacy {shlex.quote(str(source.get('path')))} --trust_pickle"
        here = shlex.quote(str(self.folder))
        return f"Extract it again: python extract_layers.py {flags} --output_dir {here} --overwrite"


def _without_metadata(folder: Path, donor: str | None) -> str:
    """What is wrong with a folder that was given for one of extracted layers, and what to run."""
    path, here = folder / METADATA, shlex.quote(str(folder))
    if (folder / "config.json").is_file():
        layers = shlex.quote(f"{folder.absolute()}_layers")
        return (
            f"{folder} is a model's folder. Extract its layers, and give the folder that they are in: "
            f"python extract_layers.py --model_name {here} --output_dir {layers}"
        )
    if old := next(folder.glob("*layer*.pt*"), None):
        imported = shlex.quote(f"{folder.absolute()}_imported")
        return (
            f"{path} is missing. If {old.name} and the others are whole modules of an older program, import them: "
            f"python extract_layers.py --from_legacy {here} --output_dir {imported}; "
            "else extract the donor's layers again."
        )
    if folder.is_dir() and any(folder.iterdir()) and (told := what_it_is(folder)):
        return told
    return (
        f"{path} is missing. Extract the donor's layers first: "
        f"python extract_layers.py --model_name {shlex.quote(donor or 'DONOR')} --output_dir {here}"
    )


def layer_file(index: int) -> str:
    """The file name of a layer."""
    return f"layer_{index:02d}.pt"


def sorted_layers(layers: Iterable[SupportsIndex]) -> list[int]:
    """Indices of layers in order, as plain integers; NumPy's and torch's are such too.

    Raises:
        SurgeryError: if there are none, one is there twice, or is no integer.
    """
    try:
        chosen = sorted(operator.index(index) for index in layers)
    except TypeError as error:
        raise SurgeryError(f"{layers!r:.80} are no indices of layers. Give integers, such as [11, 13].") from error
    if not chosen:
        raise SurgeryError("No layer is given. Name them, for example --layers 11 13 17 21.")
    if len(set(chosen)) != len(chosen):
        raise SurgeryError(f"A layer is given more than once in {chosen}. Name each layer once.")
    return chosen


def check_range(layers: Sequence[int], total: int, model: str) -> None:
    """Raise SurgeryError if an index lies outside a model of `total` layers."""
    outside = [index for index in layers if not 0 <= index < total]
    if outside:
        raise SurgeryError(
            f"Layer {', '.join(map(str, outside))} is out of range: {model} has layers 0 to {total - 1}. "
            "Choose --layers among those."
        )


def _bytes_of(files: TensorFiles, prefixes: tuple[str, ...], item_bytes: int | None) -> int:
    total = 0
    for name in files.names():
        if name.startswith(prefixes):
            place = files.ranges[name]
            total += place.numel * (item_bytes or place.dtype.itemsize)
    return total
