"""A checkpoint in the form that torch.load opens: model.pt, the whole module, and model_state_dict.pt.

In: a `GraftPlan`. Out: the two files, written together from one read. On file systems that share extents they share
their tensors with each other, with the donor's extracted layers, and with checkpoints of the same base beside them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from model_preparation.files.block_io import Advance
from model_preparation.files.new_folder import existing_parent
from model_preparation.files.shared_files import can_reflink
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.surgery.checkpoint_info import MODULE, STATE_DICT
from model_preparation.surgery.graft import GraftPlan, empty_model, tensor_ranges
from model_preparation.surgery.siblings import SiblingTensor, check_taken, sibling_folders, tensors_in_siblings
from model_preparation.tensors.pt_writer import placeholder, write_together
from model_preparation.tensors.tensor_copy import TensorSource


class PtFolder:
    """What the folder of a graft will hold.

    Args:
        graft: the plan.
        target: the checkpoint's folder.
    """

    def __init__(self, graft: GraftPlan, target: Path):
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
        self, folder: Path, generation_config: Mapping[str, Any], advance: Advance
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """Write the two files; returns {"bytes", "sha256"} of each by its name, and BLAKE3 by tensor name.

        Args:
            advance: told the bytes of every piece written or shared.

        Raises:
            SurgeryError: if a checkpoint with which tensors are shared is damaged.
            OSError: from the file system: disk full, input/output error.
        """
        model, sources = self._with_placeholders()
        model.generation_config = GenerationConfig(**generation_config)
        written = write_together({folder / MODULE: model, folder / STATE_DICT: model.state_dict()}, sources, advance)
        digests = {name: written.blake3[parameter.data_ptr()] for name, parameter in model.named_parameters()}
        check_taken(self._taken, digests)
        return {path.name: described for path, described in written.files.items()}, digests

    def _with_placeholders(self) -> tuple[LlambaForCausalLM, dict[int, TensorSource]]:
        """The grafted model with placeholders for parameters, and where the bytes of each come from."""
        dtype = self._graft.dtype
        model = empty_model(self._graft.config)
        places = tensor_ranges(self._graft) | {name: tensor.place for name, tensor in self._taken.items()}
        tensors = {name: placeholder(parameter.shape, dtype) for name, parameter in model.named_parameters()}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        return model, {tensor.data_ptr(): places[name].cast(dtype) for name, tensor in tensors.items()}
