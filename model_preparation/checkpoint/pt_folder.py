"""A checkpoint in the form that torch.load opens: model.pt, the whole module, and model_state_dict.pt.

In: `GraftParts`, and later the model that they make. Out: the two files, written together from one read. On file
systems that share extents they share their tensors with each other, with the donor's extracted layers, and with
checkpoints of the same base beside them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model_preparation.checkpoint.checkpoint_info import MODULE, STATE_DICT
from model_preparation.checkpoint.graft_parts import GraftParts
from model_preparation.checkpoint.siblings import SiblingTensor, check_taken, sibling_folders, tensors_in_siblings
from model_preparation.io.block_io import Advance
from model_preparation.io.complete_folder import existing_parent
from model_preparation.io.shared_files import can_reflink
from model_preparation.io.tensors.pt_writer import write_together

if TYPE_CHECKING:
    from torch import Tensor, nn


class PtFolder:
    """What the folder of a graft will hold.

    Args:
        graft: its parts.
        target: the checkpoint's folder.
    """

    def __init__(self, graft: GraftParts, target: Path):
        self._graft = graft
        self._checkpoints = target.resolve().parent
        self._shares = can_reflink(existing_parent(target))
        self._taken: dict[str, SiblingTensor] = {}

    @property
    def wants_base_files(self) -> bool:
        """Whether `take_from_siblings` may find anything."""
        return self._shares and any(sibling_folders(self._checkpoints))

    def take_from_siblings(self, base_files: Mapping[str, dict]) -> None:
        """Share what checkpoints of the same base hold; `base_files`: {"bytes", "blake3"} of its files by name."""
        self._taken = tensors_in_siblings(self._graft, self._checkpoints, base_files)

    @property
    def bytes_to_write(self) -> int:
        """Size of the tensors that take room of their own on the disk."""
        if not self._shares:
            return 2 * self._graft.weight_bytes
        return self._graft.weight_bytes - sum(tensor.place.size_bytes for tensor in self._taken.values())

    def write_weights(
        self, folder: Path, model: "Callable[[dict[str, Tensor]], nn.Module]", advance: Advance
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """Write the two files; returns {"bytes", "sha256"} of each by its name, and BLAKE3 by tensor name.

        Args:
            model: makes the grafted model of its parameters; called when all of them are written.
            advance: told the bytes of every piece written or shared.

        Raises:
            SurgeryError: if a checkpoint with which tensors are shared is damaged.
            OSError: from the file system: disk full, input/output error.
        """
        places = self._graft.tensors | {name: tensor.place for name, tensor in self._taken.items()}
        sources = {name: place.cast(self._graft.dtype) for name, place in places.items()}

        def contents(tensors: "dict[str, Tensor]") -> list:
            made = model(tensors)
            return [made, made.state_dict()]

        written = write_together([folder / MODULE, folder / STATE_DICT], sources, contents, advance)
        check_taken(self._taken, written.blake3)
        return {path.name: described for path, described in written.files.items()}, written.blake3
