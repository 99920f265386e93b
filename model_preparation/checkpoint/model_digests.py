"""Digests of a model's contents: its tensors, its config, its tokenizer.

Digests do not depend on the model's path or name, nor on the number of its files. Large files that have not changed
are not read again (io/known_digests.py). This module also reads tensor_digests.json, and finds tensors in checkpoints.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, TENSOR_DIGESTS, read_info
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.errors import SurgeryError
from model_preparation.io.digests import sha256_of
from model_preparation.io.known_digests import remembered
from model_preparation.io.result_inputs import digest_of, digests_of_files
from model_preparation.io.tensors.dtypes import DType, dtype_of
from model_preparation.io.tensors.sharded_weights import TensorFiles, load_tensors
from model_preparation.io.tensors.tensor_ranges import TensorRange, pt_ranges, range_of
from model_preparation.io.untrusted.pickle_check import allowed_in_module
from model_preparation.io.untrusted.pt_check import check_pt, reading_tensors
from model_preparation.io.untrusted.untrusted_files import MAX_DEPTH, check_fields, read_json
from model_preparation.llamba import LlambaForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_BYTES = 1 << 20
_MAX_MODULES = 100_000
_MAX_NUMBERS = 1 << 48  # in a tensor


@dataclass(frozen=True)
class TensorDigest:
    """An entry of tensor_digests.json: a tensor of the state dict and its origin."""

    dtype: DType
    shape: tuple[int, ...]
    blake3: str
    origin: str  # "base", "donor" or "healed"
    source_name: str  # its name in the base or donor

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor_digests(path: Path) -> dict[str, TensorDigest]:
    """The entries of tensor_digests.json, by tensor name.

    Raises:
        SurgeryError: if the file is missing or invalid.
    """
    try:
        fields = read_json(path)
        check_fields(fields, {"format_version": int, "tensors": dict})
        found = {}
        for name, entry in fields["tensors"].items():
            entry.setdefault("source_name", name)
            check_fields(entry, {"dtype": str, "shape": list, "blake3": str, "from": str, "source_name": str})
            dtype = getattr(torch, entry["dtype"], None)
            if not isinstance(dtype, torch.dtype) or any(type(size) is not int or size < 0 for size in entry["shape"]):
                raise ValueError(f"{name:.100} has no valid dtype or shape")
            if math.prod(entry["shape"]) > _MAX_NUMBERS:
                raise ValueError(f"{name:.100} has an impossible shape")
            shape = tuple(entry["shape"])
            found[name] = TensorDigest(dtype_of(dtype), shape, entry["blake3"], entry["from"], entry["source_name"])
    except FileNotFoundError as error:
        raise SurgeryError(f"{path} is missing. Build the checkpoint again.") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise SurgeryError(f"{path} cannot be read ({error}). Build the checkpoint again.") from error
    return found


def state_dict_ranges(path: Path) -> dict[str, TensorRange]:
    """Where the tensors of model_state_dict.pt lie; raises SurgeryError if the file holds anything else."""
    return pt_ranges(path, load_tensors(path, "Build the checkpoint again."))


def module_ranges(path: Path, wanted: nn.Module) -> tuple[dict[str, TensorRange], int]:
    """Where the tensors of model.pt lie, by their names in its state dict; and how many globals its pickle names.

    Buffers outside the state dict must equal those of `wanted`, a new model with the checkpoint's config.

    Raises:
        SurgeryError: if its pickle names globals that are not allowed (the error lists them), or holds another model.
    """
    with reading_tensors(path, "Build the checkpoint again."):
        found = check_pt(path, allowed_in_module())
        module = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if type(module) is not LlambaForCausalLM:
            raise ValueError("it holds no LlambaForCausalLM")
        tensors = dict(tensors_of(module))
    ranges = pt_ranges(path, tensors)
    names = wanted.state_dict().keys()
    buffers = dict(wanted.named_buffers())
    for name in sorted(tensors.keys() - names):
        tensor, buffer = tensors[name], buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or not torch.allclose(buffer, tensor.to(buffer.dtype)):
            raise SurgeryError(f"{path} holds {name}, which does not fit its config. Build the checkpoint again.")
    return {name: place for name, place in ranges.items() if name in names}, len(found.globals)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer. No method of the module is called."""
    waiting: list[tuple[str, object]] = [("", module)]
    seen = 0
    while waiting:
        prefix, item = waiting.pop()
        seen += 1
        if not isinstance(item, nn.Module) or seen > _MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise ValueError("it holds something other than nested modules")
        fields = vars(item)
        for name, tensor in (*fields["_parameters"].items(), *fields["_buffers"].items()):
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor
            elif tensor is not None:
                raise ValueError(f"{prefix}{name} is no tensor")
        waiting += [(f"{prefix}{name}.", inner) for name, inner in fields["_modules"].items() if inner is not None]


def weights_digest(tensors: Mapping[str, tuple[Any, Any, str]]) -> str:
    """BLAKE3 of the names, dtypes, shapes and BLAKE3 of tensors. This digest identifies a checkpoint's weights.

    Args:
        tensors: (dtype, shape, BLAKE3 in hex) by name.
    """
    described = {
        name: [str(dtype).removeprefix("torch."), list(shape), digest]
        for name, (dtype, shape, digest) in tensors.items()
    }
    return digest_of(described)


def digest_of_ranges(ranges: Mapping[str, TensorRange]) -> str:
    """`weights_digest` of tensors in files.

    Raises:
        OSError: if a file cannot be read.
    """
    digests = blake3_of_tensors(ranges)
    return weights_digest({name: (place.dtype, place.shape, digests[name]) for name, place in ranges.items()})


def blake3_of_tensors(ranges: Mapping[str, TensorRange]) -> dict[str, str]:
    """BLAKE3 of each tensor's bytes, by name."""
    files: dict[Path, dict[str, tuple[int, int]]] = {}
    for place in ranges.values():
        start, end = range_of(place)
        files.setdefault(place.path, {})[f"{start}-{end}"] = (start, end)
    found = {}
    for path, wanted in files.items():
        kind = digest_of({"tensors": sorted(wanted)})
        found[path] = remembered(path, kind, partial(_read, wanted=wanted))
    return {name: found[place.path]["{}-{}".format(*range_of(place))] for name, place in ranges.items()}


def _read(path: Path, wanted: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    found = {}
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        for name, (start, end) in sorted(wanted.items(), key=lambda item: item[1]):
            digest = blake3()
            file.seek(start)
            while start < end and (count := file.readinto(block[: min(_BLOCK_BYTES, end - start)])):
                digest.update(block[:count])
                start += count
            found[name] = digest.hexdigest()
    return found


def digest_of_layers(store: LayerStore, layers: Iterable[int]) -> dict[str, str]:
    """`weights_digest` of each layer, by index. Extracted layers have their tensors' BLAKE3 in metadata.json."""
    found = {}
    for index in layers:
        ranges = store.ranges(index)
        digests = store.layers.get(index, {}).get("tensors")
        if not isinstance(digests, dict) or digests.keys() != ranges.keys():
            digests = blake3_of_tensors(ranges)
        tensors = {name: (place.dtype, place.shape, digests[name]) for name, place in ranges.items()}
        found[str(index)] = weights_digest(tensors)
    return found


def digest_of_model(folder: Path) -> str:
    """The digest of a model's or a checkpoint's config and tensors."""
    if (folder / INFO).is_file():
        return digest_of({"config": read_info(folder)["config"], "weights": digest_of_checkpoint(folder)})
    config = digests_of_files([folder / "config.json"])
    return digest_of({"config": config, "weights": digest_of_ranges(TensorFiles(folder).ranges)})


def digest_of_weights(path: Path) -> str:
    """The digest of a file of weights, a model's or an adapter's folder, or a checkpoint."""
    if (path / "config.json").is_file() or (path / INFO).is_file():
        return digest_of_model(path)
    return digest_of(digests_of_files([path] if path.is_file() else filter(Path.is_file, path.iterdir())))


def digest_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The digest of everything that turns text into tokens. It stays the same if the tokenizer is saved and loaded."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest_of(
        {
            "tokens": sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str()),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
            "sides": [tokenizer.padding_side, tokenizer.truncation_side],
            "added": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")],
        }
    )


def digest_of_checkpoint(folder: Path) -> str:
    """`weights_digest` of a checkpoint's weights, read from its files.

    If the tensors of model_state_dict.pt cannot be found, this is a digest of the whole file.

    Raises:
        OSError: if a file is missing or cannot be read.
    """
    if read_info(folder).get("format") != "hf":
        try:
            return digest_of_ranges(state_dict_ranges(folder / STATE_DICT))
        except SurgeryError:  # it holds views, or cannot be loaded
            return digest_of(digests_of_files([folder / STATE_DICT]))
    ranges = TensorFiles(folder).ranges
    for tied, name in LlambaForCausalLM._tied_weights_keys.items():
        ranges.setdefault(tied, ranges[name])
    return digest_of_ranges(ranges)


def recorded_weights(folder: Path) -> str:
    """`weights_digest` of a checkpoint's weights at its build, from its tensor_digests.json."""
    tensors = read_tensor_digests(folder / TENSOR_DIGESTS)
    return weights_digest({name: (entry.dtype, entry.shape, entry.blake3) for name, entry in tensors.items()})


def digests_as_recorded(recorded: Mapping[str, Mapping[str, Any]], folder: Path) -> tuple[dict, dict]:
    """(recorded digests, digests of the files in `folder`), both by file name. Equal dicts mean equal files.

    A file with another size is not read: its digest is given as zeros. The first versions recorded SHA-256, not BLAKE3.
    """
    then: dict[str, str] = {}
    now: dict[str, str | None] = {}
    for name, entry in recorded.items():
        path, kind = folder / name, "blake3" if "blake3" in entry else "sha256"
        then[name] = entry[kind]
        if not path.is_file():
            now[name] = None
        elif path.stat().st_size != entry["bytes"]:
            now[name] = "0" * 64
        elif kind == "blake3":
            now |= digests_of_files([path])
        else:
            now[name] = remembered(path, kind, lambda path: {"": sha256_of(path)})[""]
    return then, now
