"""Plans and writes the files of a checkpoint's weights, in either format.

Format pt has model.pt (the whole module) and model_state_dict.pt. Each tensor is read once for both. On file systems
that share extents (XFS, Btrfs), the two files share tensors with each other, with the donor's extracted layers, and
with checkpoints of the same base in the same folder ("siblings"). Ten such checkpoints take the disk space of one, plus
ten times the grafted layers.

Format hf has one safetensors file ("shard") per layer, one for the embedding and one for the head.
base_store.py stores the shards of a base once for all checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from model_preparation.checkpoint.base_store import STORE, BaseStore
from model_preparation.checkpoint.checkpoint_info import INFO, MODULE, STATE_DICT, TENSOR_DIGESTS, read_info
from model_preparation.checkpoint.graft_parts import GraftParts
from model_preparation.errors import SurgeryError
from model_preparation.io.block_io import Advance
from model_preparation.io.complete_folder import check_space, existing_parent
from model_preparation.io.known_digests import describe_source_file, is_known
from model_preparation.io.linked_files import can_reflink
from model_preparation.io.progress import bar
from model_preparation.io.tensors.pt_writer import write_together
from model_preparation.io.tensors.safetensors_writer import Shard
from model_preparation.io.tensors.tensor_ranges import StoredTensor, TensorRange

if TYPE_CHECKING:
    from torch import Tensor

    from model_preparation.llamba import LlambaForCausalLM

_SMALL_FILES_BYTES = 64_000_000  # more than tokenizer, JSON files and README need


@dataclass(frozen=True)
class SiblingTensor:
    """A tensor of the base in a sibling: where it lies, and the BLAKE3 that it must have."""

    place: TensorRange
    blake3: str


class GraftWeights:
    """Plans and writes the files of a graft's weights.

    Args:
        graft: the parts of the graft.
        target: the checkpoint's folder.
        format: "pt", "hf" or "both".
    """

    def __init__(self, graft: GraftParts, target: Path, format: str):
        self._graft, self._target = graft, target
        self._has_pt, self._has_hf = format != "hf", format != "pt"
        self._checkpoints = target.resolve().parent
        self._shares_extents = self._has_pt and can_reflink(existing_parent(target))
        self._shares_tensors = self._shares_extents and graft.keeps_base_tensors
        self._siblings: dict[str, SiblingTensor] = {}
        self._base_files: dict[str, dict] = {}
        if graft.parent is not None:
            self._base_files = graft.parent.info["base_model"]["files"]

    @cached_property
    def _store(self) -> BaseStore:
        return BaseStore(self._checkpoints, self.base_files(), self._graft.dtype)

    @cached_property
    def _shards(self) -> tuple[list[Shard], list[Shard]]:
        """(shards of the base, which checkpoints share; all other shards), both in the model's order."""
        by_file: dict[str, dict[str, StoredTensor]] = {}
        for name, place in self._graft.tensors.items():
            by_file.setdefault(shard_file(name), {})[name] = place
        grafted = {shard_file(prefix) for prefix in self._graft.replaced_prefixes}
        shards = [Shard(file, ranges, self._graft.dtype) for file, ranges in by_file.items()]
        own = [s for s in shards if s.file not in grafted] if self._graft.keeps_base_tensors else []
        if self._graft.parent is not None:  # a damaged parent must add nothing to the store
            missing = self._store.missing(own)
            own = [s for s in own if s not in missing]
        return own, [s for s in shards if s not in own]

    @cached_property
    def has_siblings(self) -> bool:
        """Whether other checkpoints may hold tensors to share. Reading those checkpoints imports torch."""
        return self._shares_tensors and any(_sibling_folders(self._checkpoints))

    def base_files(self, check_stopped: Callable[[], object] = lambda: None) -> dict[str, dict]:
        """{"bytes", "blake3"} of the base's files by name. A file whose digest is known already is not read again.

        Args:
            check_stopped: called before each file; may raise an exception.
        """
        for path in self._graft.base_paths:
            check_stopped()
            if path.name not in self._base_files:
                self._base_files[path.name] = describe_source_file(path)
        return self._base_files

    def prepare(self, check_stopped: Callable[[], object] = lambda: None) -> None:
        """Find the tensors and shards that can be shared instead of written. This may read the base.

        Args:
            check_stopped: called before each of the base's files; may raise an exception.
        """
        if not (self._has_hf or self.has_siblings):
            return
        with bar("Reading the base", len(self._graft.base_paths)) as advance:
            base_files = self.base_files(lambda: (check_stopped(), advance(1)))
        if self.has_siblings:
            self._siblings = _tensors_in_siblings(self._graft, self._checkpoints, base_files)

    def _bytes_to_write(self, *, read_base: bool = False) -> int:
        """How many bytes will be written. Without `read_base`, the number may be too large."""
        if read_base:
            self.prepare()
        size_bytes = 0
        if self._has_pt:
            copy_bytes = self._graft.weight_bytes
            shared_bytes = sum(tensor.place.size_bytes for tensor in self._siblings.values())
            size_bytes += copy_bytes - shared_bytes if self._shares_extents else 2 * copy_bytes
        if self._has_hf:
            base_shards, other_shards = self._shards
            size_bytes += sum(shard.size_bytes for shard in other_shards)
            if read_base or all(map(is_known, self._graft.base_paths)):
                base_shards = self._store.missing(base_shards)
            size_bytes += sum(shard.size_bytes for shard in base_shards)
        return size_bytes

    def check_room(self) -> None:
        """Raise SurgeryError if the disk has too little room for the files."""
        try:
            check_space(self._target, _SMALL_FILES_BYTES + self._bytes_to_write())
        except SurgeryError:
            check_space(self._target, _SMALL_FILES_BYTES + self._bytes_to_write(read_base=True))

    def describe(self) -> str:
        """A line to print: how much `write` will write, and where."""
        size = decimal(self._bytes_to_write())
        if not self._has_hf:
            return f"To write     {size} in {MODULE} and {STATE_DICT}"
        return f"To write     {size}; shards of the base in {STORE} are shared"

    def write(
        self, folder: Path, model: "Callable[[dict[str, Tensor]], LlambaForCausalLM]", advance: Advance
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """Write the files; returns {"bytes", "sha256"} by file name, and BLAKE3 by tensor name.

        Args:
            model: makes the grafted model from its parameters; called when all of them are written.
            advance: called with the size in bytes of each written or shared piece; may raise an exception.

        Raises:
            SurgeryError: if a sibling that shares tensors is damaged.
            OSError: from the file system: disk full, input/output error.
        """
        files: dict[str, dict] = {}
        digests: dict[str, str] = {}
        if self._has_pt:
            places = self._graft.tensors | {name: tensor.place for name, tensor in self._siblings.items()}
            sources = {name: place.cast(self._graft.dtype) for name, place in places.items()}
            paths = [folder / MODULE, folder / STATE_DICT]
            files, digests = write_together(paths, sources, lambda tensors: _pt_contents(model(tensors)), advance)
            _check_siblings(self._siblings, digests)
        if self._has_hf:
            base_shards, other_shards = self._shards
            for shard in base_shards:
                files[shard.file], inside = self._store.provide(shard, folder / shard.file, advance)
                digests |= inside
            for shard in other_shards:
                files[shard.file], inside = shard.write(folder / shard.file, advance)
                digests |= inside
        return files, digests


def write_model(folder: Path, model: "LlambaForCausalLM", format: str, advance: Advance) -> dict[str, dict]:
    """Write the weights of a model that is in memory; returns {"bytes", "sha256"} of the .pt files by name.

    Args:
        advance: called with the size in bytes of each written piece or shard.

    Raises:
        OSError, SafetensorError: from the file system: disk full, input/output error.
    """
    from safetensors.torch import save_file

    files: dict[str, dict] = {}
    if format != "hf":
        paths = [folder / MODULE, folder / STATE_DICT]
        files, _ = write_together(paths, {}, lambda _: _pt_contents(model), advance)
    if format != "pt":
        by_file: dict[str, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():  # tied parameters appear once
            by_file.setdefault(shard_file(name), {})[name] = parameter.detach().contiguous()
        for file, tensors in by_file.items():
            save_file(tensors, folder / file, {"format": "pt"})
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    return files


def _pt_contents(model: "LlambaForCausalLM") -> list:
    return [model, model.state_dict()]


def shard_file(name: str) -> str:
    """The safetensors file that holds the tensor called `name`."""
    if name.startswith("backbone.layers."):
        return f"layer_{int(name.split('.')[2]):02d}.safetensors"
    return "embedding.safetensors" if name.startswith("backbone.embedding.") else "head.safetensors"


def _sibling_folders(checkpoints: Path) -> Iterator[Path]:
    """The checkpoints in a folder that have a model_state_dict.pt, sorted."""
    for path in sorted(checkpoints.glob(f"*/{INFO}")):
        if (path.parent / STATE_DICT).is_file():
            yield path.parent


def _tensors_in_siblings(
    graft: GraftParts, checkpoints: Path, base_files: Mapping[str, dict]
) -> dict[str, SiblingTensor]:
    """The base's tensors in siblings with the same base files and dtype, by name in the grafted model."""
    from model_preparation.checkpoint.model_digests import read_tensor_digests, state_dict_ranges  # imports torch

    found: dict[str, SiblingTensor] = {}
    for folder in _sibling_folders(checkpoints):
        try:
            info = read_info(folder)
            if info["base_model"]["files"] != base_files or info["dtype"] != graft.dtype.name:
                continue
            recorded = read_tensor_digests(folder / TENSOR_DIGESTS)
            for name, place in state_dict_ranges(folder / STATE_DICT).items():
                if recorded[name].origin == "base" and not name.startswith(graft.replaced_prefixes):
                    found.setdefault(name, SiblingTensor(place, recorded[name].blake3))
        except (SurgeryError, OSError, KeyError, TypeError):
            continue  # an unreadable sibling shares nothing, which is no error
    return found


def _check_siblings(siblings: Mapping[str, SiblingTensor], digests: Mapping[str, str]) -> None:
    """Raise SurgeryError if a shared tensor has changed since its checkpoint was built.

    Args:
        digests: BLAKE3 of the tensors that were written now, by name.
    """
    for name, tensor in siblings.items():
        if digests.get(name, tensor.blake3) != tensor.blake3:
            folder = tensor.place.path.parent
            raise SurgeryError(
                f"{tensor.place.path} is damaged: {name} has changed since the build, and the new checkpoint would "
                f"share it. Remove {folder} or build it again (verify_checkpoint.py lists the faults)."
            )
