"""The tensors of a checkpoint: where they lie, and what its base and its donor hold in their places.

In: a checkpoint's folder and its checkpoint_info.json. Out: per file the ranges of its tensors by name; names with
digests out of a base or out of extracted layers. No tensor is in memory as a whole unless its dtype must be cast.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor, nn

from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.errors import SurgeryError
from model_preparation.io.digests import read_digests
from model_preparation.io.tensors.dtypes import DType, dtype_of
from model_preparation.io.tensors.tensor_files import TensorFiles, load_tensors
from model_preparation.io.tensors.tensor_ranges import MappedFiles, TensorRange, bytes_of, pt_ranges, range_of
from model_preparation.io.untrusted.pickle_check import allowed_in_module
from model_preparation.io.untrusted.pt_check import check_pt
from model_preparation.io.untrusted.untrusted_files import MAX_DEPTH, check_fields, read_json
from model_preparation.llamba import LlambaForCausalLM

_CAST_NUMBERS = 1 << 22  # at a time
_MAX_MODULES = 100_000
_MAX_NUMBERS = 1 << 48  # in a tensor

Advance = Callable[[int], None]


@dataclass(frozen=True)
class TensorDigest:
    """A line of tensor_digests.json: what a tensor of the state dict is, and where it was taken from."""

    dtype: DType
    shape: tuple[int, ...]
    blake3: str
    origin: str  # "base", "donor" or "healed"
    source_name: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor_digests(path: Path) -> dict[str, TensorDigest]:
    """tensor_digests.json, by the names of the state dict.

    Raises:
        SurgeryError: if it is missing or not one.
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
                raise ValueError(f"{name:.100} has no dtype or shape")
            if math.prod(entry["shape"]) > _MAX_NUMBERS:
                raise ValueError(f"{name:.100} has a shape no tensor has")
            shape = tuple(entry["shape"])
            found[name] = TensorDigest(dtype_of(dtype), shape, entry["blake3"], entry["from"], entry["source_name"])
    except FileNotFoundError as error:
        raise SurgeryError(f"{path} is missing. Build the checkpoint again.") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise SurgeryError(f"{path} cannot be read ({error}). Build the checkpoint again.") from error
    return found


def state_dict_ranges(path: Path) -> dict[str, TensorRange]:
    """Where the tensors of model_state_dict.pt lie; raises SurgeryError if it holds anything else."""
    return pt_ranges(path, load_tensors(path, "Build the checkpoint again."))


def module_ranges(path: Path, wanted: nn.Module) -> tuple[dict[str, TensorRange], int]:
    """Where the tensors of model.pt lie, by their names in its state dict; and how many globals its pickle names.

    The buffers that are in no state dict are compared with those of `wanted`, a model newly made.

    Raises:
        SurgeryError: if its pickle names a global that is not allowed, each by its name, or holds no such model.
    """
    try:
        found = check_pt(path, allowed_in_module())
        module = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if type(module) is not LlambaForCausalLM:
            raise ValueError("it holds no LlambaForCausalLM")
        tensors = dict(tensors_of(module))
    except (SurgeryError, OSError):
        raise
    except Exception as error:  # what passes the checks may still make torch raise anything at all
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SurgeryError(f"{path} cannot be read ({reason}). Build the checkpoint again.") from error
    ranges = pt_ranges(path, tensors)
    kept = wanted.state_dict().keys()
    made = dict(wanted.named_buffers())
    for name, tensor in tensors.items():
        if name in kept:
            continue
        if (
            name not in made
            or made[name].shape != tensor.shape
            or not torch.allclose(made[name], tensor.to(made[name].dtype))
        ):
            raise SurgeryError(f"{path} holds {name}, which its config does not give. Build the checkpoint again.")
    return {name: place for name, place in ranges.items() if name in kept}, len(found.globals)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer, without calling anything that came with the module."""
    waiting: list[tuple[str, object]] = [("", module)]
    seen = 0
    while waiting:
        prefix, item = waiting.pop()
        seen += 1
        if not isinstance(item, nn.Module) or seen > _MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise ValueError("it holds something else than modules in modules")
        fields = vars(item)
        for name, tensor in (*fields["_parameters"].items(), *fields["_buffers"].items()):
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor
            elif tensor is not None:
                raise ValueError(f"{prefix}{name} is no tensor")
        waiting += [(f"{prefix}{name}.", inner) for name, inner in fields["_modules"].items() if inner is not None]


def base_digests(folder: Path, wanted: Mapping[str, TensorDigest], advance: Advance) -> dict[str, str | None]:
    """The BLAKE3 that each of `wanted` has in a base, by name; None where the base has no such tensor."""
    ranges = TensorFiles(folder).ranges
    places = {name: ranges.get(digest.source_name) for name, digest in wanted.items()}
    return _digests_of(places, wanted, advance)


def donor_digests(store: LayerStore, wanted: Mapping[str, TensorDigest], advance: Advance) -> dict[str, str | None]:
    """The BLAKE3 that each of `wanted` has in extracted layers, by name; None where they have no such tensor.

    metadata.json has those of tensors stored in the dtype wanted; the others are read and cast.
    """
    found: dict[str, str | None] = {}
    places: dict[str, TensorRange | None] = {}
    ranges: dict[int, dict[str, TensorRange]] = {}
    numbers = {str(number): number for number in store.layers}
    for name, digest in wanted.items():
        index, _, inner = name.removeprefix("backbone.layers.").partition(".")
        entry = store.layers.get(numbers.get(index, -1))
        if entry is None:
            found[name] = None
            continue
        recorded = entry.get("tensors")
        stored_as = f"torch.{entry.get('dtype')}"
        if isinstance(recorded, dict) and inner in recorded and stored_as == str(digest.dtype):
            found[name] = str(recorded[inner])
        else:
            number = numbers[index]
            if number not in ranges:
                ranges[number] = store.ranges(number)
            places[name] = ranges[number].get(inner)
    return found | _digests_of(places, wanted, advance)


def _digests_of(
    places: Mapping[str, TensorRange | None], wanted: Mapping[str, TensorDigest], advance: Advance
) -> dict[str, str | None]:
    """Each file is read once for the tensors that need no cast."""
    found: dict[str, str | None] = {}
    whole: dict[Path, dict[str, TensorRange]] = {}
    mapped = MappedFiles()
    for name, place in places.items():
        if place is None or place.shape != wanted[name].shape:
            found[name] = None
        elif place.dtype == wanted[name].dtype:
            whole.setdefault(place.path, {})[name] = place
        else:
            found[name] = _cast_digest(mapped.tensor(place), wanted[name].dtype.torch)
            mapped.forget(place)
            advance(place.size_bytes)
    for path, inside in whole.items():
        digests = read_digests(path, [range_of(place) for place in inside.values()], advance).blake3
        found |= {name: digests.get(range_of(place)) for name, place in inside.items()}
    return found


def _cast_digest(tensor: Tensor, dtype: torch.dtype) -> str:
    digest = blake3()
    for piece in tensor.reshape(-1).split(_CAST_NUMBERS):
        digest.update(bytes_of(piece.to(dtype)))
    return digest.hexdigest()
