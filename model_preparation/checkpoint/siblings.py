"""Tensors of the base that a checkpoint beside the new one holds already, on file systems that share extents.

In: a graft, the folder of checkpoints, the digests of the base's files. Out: per tensor its place in a sibling's
model_state_dict.pt, from where it can be shared instead of written once more. On such a file system (XFS, Btrfs), ten
checkpoints of one base take the room of one and of ten times the grafted layers. A sibling is not trusted: what is
taken from it is read, and has to have the digest that was recorded when it came from the base itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from model_preparation.checkpoint.checkpoint_info import INFO, STATE_DICT, TENSOR_DIGESTS, read_info
from model_preparation.checkpoint.graft_parts import GraftParts
from model_preparation.errors import SurgeryError
from model_preparation.io.tensors.tensor_ranges import TensorRange


@dataclass(frozen=True)
class SiblingTensor:
    """Where a tensor lies in a sibling, and what its BLAKE3 must be."""

    place: TensorRange
    blake3: str


def tensors_in_siblings(
    graft: GraftParts, checkpoints: Path, base_files: Mapping[str, dict]
) -> dict[str, SiblingTensor]:
    """By name in the grafted model, the tensors of the base that checkpoints in `checkpoints` hold.

    Args:
        base_files: {"bytes", "blake3"} of the base's files by name; a sibling's must be the same.
    """
    from model_preparation.checkpoint.tensor_digests import read_tensor_digests, state_dict_ranges  # imports torch

    found: dict[str, SiblingTensor] = {}
    replaced = tuple(f"backbone.layers.{index}." for index in graft.layers)
    for folder in sibling_folders(checkpoints):
        try:
            info = read_info(folder)
            if info["base_model"]["files"] != base_files or info["dtype"] != graft.dtype.name:
                continue
            recorded = read_tensor_digests(folder / TENSOR_DIGESTS)
            for name, place in state_dict_ranges(folder / STATE_DICT).items():
                if recorded[name].origin == "base" and not name.startswith(replaced):
                    found.setdefault(name, SiblingTensor(place, recorded[name].blake3))
        except (SurgeryError, OSError, KeyError, TypeError):
            continue  # what cannot be read cannot be shared; it is not this build's concern
    return found


def sibling_folders(checkpoints: Path) -> Iterator[Path]:
    """The folders in `checkpoints` that hold a checkpoint with a model_state_dict.pt, in order."""
    for info_path in sorted(checkpoints.glob(f"*/{INFO}")):
        if (info_path.parent / STATE_DICT).is_file():
            yield info_path.parent


def check_taken(taken: Mapping[str, SiblingTensor], digests: Mapping[str, str]) -> None:
    """Raise SurgeryError if what was taken from siblings is not what they held when they were built.

    Args:
        digests: BLAKE3 of the tensors as they were written, by name.
    """
    for name, tensor in taken.items():
        if digests.get(name, tensor.blake3) != tensor.blake3:
            folder = tensor.place.path.parent
            raise SurgeryError(
                f"{tensor.place.path} is damaged: {name} is not what it was when it was built, and the new checkpoint "
                f"would have shared it. Remove {folder} or build it again (verify_checkpoint.py says what is wrong)."
            )
