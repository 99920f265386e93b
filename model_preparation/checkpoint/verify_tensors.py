"""Compares a checkpoint's tensors with their recorded digests, the config, the base and the donor.

A whole tensor is in memory only if its dtype must be cast, or if it is put together from grafted heads.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from rich.filesize import decimal
from torch import Tensor

from model_preparation.checkpoint.checkpoint_info import (
    HEALED,
    INFO,
    MODULE,
    STATE_DICT,
    TENSOR_DIGESTS,
    formats_of,
    grafted_heads,
    is_healed,
)
from model_preparation.checkpoint.graft_parts import donor_prefixes
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.checkpoint.layer_store import METADATA, LayerStore
from model_preparation.checkpoint.model_digests import (
    TensorDigest,
    module_ranges,
    read_tensor_digests,
    state_dict_ranges,
)
from model_preparation.checkpoint.verify import Verification
from model_preparation.command_line import default_folder
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import donors_of
from model_preparation.io.block_io import Advance
from model_preparation.io.digests import FileDigests, read_digests
from model_preparation.io.progress import bar
from model_preparation.io.tensors.sharded_weights import TensorFiles
from model_preparation.io.tensors.tensor_ranges import MappedFiles, StoredTensor, TensorRange, bytes_of, range_of
from model_preparation.io.untrusted.untrusted_config import config_from
from model_preparation.llamba.configuration_llamba import LlambaConfig

_CAST_NUMBERS = 1 << 22  # cast at a time


class TensorChecks:
    """The tensors in a checkpoint's files, and the tensors that should be there.

    Attributes:
        ranges: where each tensor lies, by file and by name in the state dict.
    """

    def __init__(self, found: Verification, info: dict[str, Any], recorded: Mapping[str, dict]):
        self._found = found
        self._info = info
        self.ranges: dict[str, dict[str, TensorRange]] = {}
        self._wanted: dict[str, TensorDigest] = {}
        self._tied: set[str] = set()
        try:
            self._wanted = read_tensor_digests(found.directory / TENSOR_DIGESTS)
        except SurgeryError as error:
            found.fault(TENSOR_DIGESTS, f"cannot be used: {error}")
        try:
            config = config_from(info["config"], LlambaConfig)
            model = empty_model(config)
        except (ValueError, SurgeryError) as error:
            found.fault(INFO, f"has a config that describes no model ({error})")
            return
        if config.tie_word_embeddings:
            self._tied = {"lm_head.weight"}
        self._check_shapes(model, config)
        directory = found.directory
        if MODULE in recorded and (directory / MODULE).exists():
            self._locate(MODULE, lambda path: self._module(path, model))
        if STATE_DICT in recorded and (directory / STATE_DICT).exists():
            self._locate(STATE_DICT, state_dict_ranges)
        if "hf" in formats_of(info):
            try:
                for name, place in TensorFiles(directory).ranges.items():
                    self.ranges.setdefault(place.path.name, {})[name] = place
            except (SurgeryError, OSError) as error:
                found.fault("model.safetensors", f"cannot be used: {error}")

    def _locate(self, name: str, ranges_in: Callable[[Path], dict[str, TensorRange]]) -> None:
        try:
            self.ranges[name] = ranges_in(self._found.directory / name)
        except (SurgeryError, OSError) as error:
            self._found.fault(name, f"cannot be used: {error}")

    def _module(self, path: Path, model: torch.nn.Module) -> dict[str, TensorRange]:
        ranges, count = module_ranges(path, model)
        self._found.check("Pickle", f"{count} globals of {MODULE}, all of them allowed")
        return ranges

    def _check_shapes(self, model: torch.nn.Module, config: LlambaConfig) -> None:
        """Compare the names, shapes, dtypes and origins in tensor_digests.json with the config."""
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name in sorted(shapes.keys() - self._wanted.keys() - self._tied):
            self._found.fault(name, f"is not listed in {TENSOR_DIGESTS}, but the config asks for it")
        replaced = donor_prefixes(config.llama_layers, config.llama_heads)
        healed = {HEALED} if is_healed(self._info) else set()
        for name, digest in self._wanted.items():
            if digest.shape != shapes.get(name):
                wanted = list(shapes[name]) if name in shapes else "no such tensor"
                self._found.fault(name, f"has shape {list(digest.shape)}, but the config needs {wanted}")
            if digest.dtype.name != (dtype := self._info.get("dtype")):
                self._found.fault(name, f"is {digest.dtype.name}, but {INFO} says {dtype}")
            origins = {"donor" if name.startswith(replaced) else "base", *healed}
            if digest.origin not in origins:
                wanted = " or ".join(sorted(origins))
                self._found.fault(name, f"has the origin {digest.origin}, but the config needs {wanted}")
        if count := sum(digest.origin == HEALED for digest in self._wanted.values()):
            self._found.check("Healed", f"{count} tensors come from neither base nor donor: they were trained")
        if config.llama_layers != self._info["replaced_layers"]:
            self._found.fault(INFO, f"lists other grafted layers than its config ({config.llama_layers})")
        if config.llama_heads != self._info.get("grafted_heads", {}):
            self._found.fault(INFO, f"lists other grafted heads than its config ({config.llama_heads})")
        self._found.check("Config", f"{len(self._wanted)} names, shapes and dtypes")

    def compare(self, digests: Mapping[str, FileDigests]) -> None:
        """Compare every tensor in the files with tensor_digests.json."""
        count = size_bytes = 0
        seen: set[str] = set()
        shards = {name for name in self.ranges if name not in (MODULE, STATE_DICT)}
        for file, ranges in self.ranges.items():
            for name, place in ranges.items():
                count += 1
                size_bytes += place.size_bytes
                self._compare_one(file, name, place, digests)
            if file in shards:
                seen |= ranges.keys()
            else:
                self._report_missing(file, ranges.keys())
        if shards:
            self._report_missing("the safetensors files", seen | self._tied)
        self._found.check("Tensors", f"{count} against their BLAKE3, {decimal(size_bytes)}")

    def _compare_one(self, file: str, name: str, place: TensorRange, digests: Mapping[str, FileDigests]) -> None:
        wanted = self._wanted.get(name)
        if wanted is None:
            self._found.fault(name, f"in {file} is not listed in {TENSOR_DIGESTS}")
        elif (place.dtype, place.shape) != (wanted.dtype, wanted.shape):
            self._found.fault(
                name, f"in {file} is {place.dtype} {list(place.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
            )
        elif file in digests and digests[file].blake3.get(range_of(place)) != wanted.blake3:
            self._found.fault(name, f"in {file} is changed (its BLAKE3 differs from the recorded one)")

    def _report_missing(self, file: str, names: Any) -> None:
        for name in sorted(self._wanted.keys() - set(names)):
            self._found.fault(name, f"is not in {file}")

    def compare_base(self, folder: Path | None) -> None:
        """Compare the kept tensors with the base's."""
        wanted = {name: digest for name, digest in self._wanted.items() if digest.origin == "base"}
        if folder is None:
            self._found.check("Base", f"{len(wanted)} tensors not compared; --base NAME|PATH compares them")
            return
        ranges = TensorFiles(folder).ranges
        places = {name: ranges.get(digest.source_name) for name, digest in wanted.items()}
        self._compare_with("base", folder, wanted, lambda advance: _digests_of(places, wanted, advance))

    def compare_donor(self, store: LayerStore | None) -> None:
        """Compare the tensors of grafted layers and heads with the donor's."""
        wanted = {name: digest for name, digest in self._wanted.items() if digest.origin == "donor"}
        if store is None:
            store = self._store_of_same_source()
        if store is None:
            self._found.check("Donor", f"{len(wanted)} tensors not compared; --llama_layers_dir DIR compares them")
            return
        layers = [*self._info["replaced_layers"], *grafted_heads(self._info)]
        if "other_donors" in self._info:
            layers = self._layers_of(store)
            others = {name for name in wanted if int(name.split(".")[2]) not in layers}
            wanted = {name: digest for name, digest in wanted.items() if name not in others}
            self._found.check(
                "Donor", f"{len(others)} tensors belong to another donor; --llama_layers_dir DIR compares them"
            )
        for index in layers:
            try:
                store.check([index])  # that the layer's file is as metadata.json describes it
            except SurgeryError as error:
                self._found.fault(f"layer {index} of the donor", f"cannot be compared: {error}")
        heads = grafted_heads(self._info)
        self._compare_with("donor", store.folder, wanted, lambda advance: _donor_digests(store, wanted, heads, advance))

    def _compare_with(
        self,
        which: str,
        folder: Path,
        wanted: Mapping[str, TensorDigest],
        digests_of: Callable[[Callable[[int], None]], dict[str, str | None]],
    ) -> None:
        """Report each tensor that differs. If more than half do, report one fault instead: another base or donor."""
        sizes = {name: digest.size_bytes for name, digest in wanted.items()}
        with bar(f"Reading the {which}", sum(sizes.values()), in_bytes=True) as advance:
            digests = digests_of(advance)
        missing = {name for name in wanted if digests[name] is None and name not in self._tied}
        faulty = [
            name for name, digest in wanted.items() if name in missing or digests[name] not in (digest.blake3, None)
        ]
        if 2 * len(faulty) > len(wanted):
            self._found.compared_with_another(
                f"{folder} is not the {which} that the checkpoint was built from, {self._recorded(which)}: "
                f"{len(faulty)} of {len(wanted)} tensors differ or are missing there"
            )
        else:
            for name in faulty:
                fault = "is missing, or has another shape," if name in missing else f"differs from the {which}'s"
                self._found.fault(name, f"{fault} in {folder}")
        self._found.check(which.capitalize(), f"{len(wanted)} tensors, {decimal(sum(sizes.values()))}, with {folder}")

    def _recorded(self, which: str) -> str:
        """The name of the base or donor in checkpoint_info.json."""
        source = self._info.get("base_model" if which == "base" else "replacement_source")
        if not isinstance(source, dict):
            return f"which {INFO} does not name"
        return str(source.get("path") or source.get("id"))

    def _layers_of(self, store: LayerStore) -> list[int]:
        """The grafted layers that come from the donor of `store`.

        If there are none, the layers that come from the checkpoint's first donor.
        """
        donors = donors_of(self._info)
        source = store.metadata["source"]
        chosen = next((d for d in donors if all(d.get(name) == source[name] for name in source)), None)
        if chosen is None:
            files = {entry["sha256"] for entry in store.layers.values()}
            chosen = next((donor for donor in donors if files & {*donor["layers"].values()}), donors[0])
        return [int(index) for index in chosen["layers"]]

    def _store_of_same_source(self) -> LayerStore | None:
        """The default folder of extracted layers, if it holds the layers that the checkpoint was built from."""
        folder = default_folder("extracted_llama_layers")
        layers = self._info.get("replacement_source", {}).get("layers")
        if layers is None or not (folder / METADATA).is_file():
            return None
        try:
            store = LayerStore(folder)
        except SurgeryError:
            return None  # no error, because the user did not name this folder
        here = {str(index): entry["sha256"] for index, entry in store.layers.items()}
        return store if layers.items() <= here.items() else None


def _donor_digests(
    store: LayerStore, wanted: Mapping[str, TensorDigest], heads: Mapping[int, list[int]], advance: Advance
) -> dict[str, str | None]:
    """BLAKE3 of the donor's tensors for the names in `wanted`; None if the donor has no such tensor.

    metadata.json has the BLAKE3 of a tensor in its stored dtype. For another dtype, the tensor is read and cast.
    """
    found: dict[str, str | None] = {}
    places: dict[str, StoredTensor | None] = {}
    ranges_of = functools.cache(store.ranges)
    indices = {str(index): index for index in store.layers}
    for name, digest in wanted.items():
        number, _, inner = name.removeprefix("backbone.layers.").partition(".")
        index = indices.get(number)
        entry = {} if index is None else store.layers[index]
        if index is not None and index in heads:
            places[name] = store.head_ranges(index, heads[index]).get(inner.removeprefix("attention."))
            continue
        recorded = entry.get("tensors")
        if isinstance(recorded, dict) and inner in recorded and entry.get("dtype") == digest.dtype.name:
            found[name] = str(recorded[inner])
        else:
            places[name] = None if index is None else ranges_of(index).get(inner)
    return found | _digests_of(places, wanted, advance)


def _digests_of(
    places: Mapping[str, StoredTensor | None], wanted: Mapping[str, TensorDigest], advance: Advance
) -> dict[str, str | None]:
    """BLAKE3 of the tensors at `places`, by name; None if a tensor is missing or has another shape.

    Each file is read once for all its tensors that need no cast.
    """
    found: dict[str, str | None] = {}
    whole: dict[Path, dict[str, TensorRange]] = {}
    mapped = MappedFiles()
    for name, place in places.items():
        if place is None or place.shape != wanted[name].shape:
            found[name] = None
        elif isinstance(place, TensorRange) and place.dtype == wanted[name].dtype:
            whole.setdefault(place.path, {})[name] = place
        else:
            found[name] = _cast_digest(mapped.tensor(place), wanted[name].dtype.torch)
            if isinstance(place, TensorRange):
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
