"""The donor's hidden states, moved forward layer by layer, in memory or in a memory-mapped file.

Each layer has a file of the states that enter it. When this file is complete, it gets its name, and the file of the
previous layer is removed. So a killed run resumes from the file that is left.
"""

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from transformers import PreTrainedConfig

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import sync
from model_preparation.io.complete_folder import existing_parent
from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.train_layer import Teacher, apply_layer


class HiddenStates:
    """The hidden states that enter layer `index` of a donor.

    Args:
        tokens: (sequences, length) int64.
        folder: for files of states; only one run at a time uses it. None keeps the states in memory.
        wanted: the first layer whose states are needed. If `folder` has a file for this layer, or for an earlier one,
            the states are read from the file with the highest number.

    Attributes:
        values: (sequences, length, width) float32, on the CPU.
        index: the number of the layer that `values` enter.
    """

    def __init__(self, donor: Donor, tokens: Tensor, folder: Path | None, wanted: int):
        self._donor, self._folder = donor, folder
        self._shape = (*tokens.shape, donor.config.hidden_size)
        self.index = 0
        found = [] if folder is None else [i for i in range(wanted, -1, -1) if self._path(i).is_file()]
        if found:
            self.index = found[0]
            self.values = self._open(self._path(self.index))
        else:
            self.values = self._new()
            embedding = donor.files["model.embed_tokens.weight"]
            for row, sequence in enumerate(tokens):
                self.values[row] = embedding[sequence]
            self._keep(0)

    def advance(self, layer: nn.Module) -> None:
        """Apply `layer`, the donor's layer `index`, to the states. They then enter the next layer."""
        teacher = Teacher(layer)
        before = self.values
        if self._folder is not None:
            self.values = self._new()
        apply_layer(teacher.output, before, self.values)
        self._keep(self.index + 1)

    def remove(self) -> None:
        """Remove the file of the states."""
        self._path(self.index).unlink()

    def _new(self) -> Tensor:
        if self._folder is None:
            return torch.empty(self._shape)
        path = self._folder / "new"
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            # Reserve the space now: a mapping cannot report a full disk later.
            os.posix_fallocate(file.fileno(), 0, math.prod(self._shape) * torch.float32.itemsize)
        return self._open(path)

    def _open(self, path: Path) -> Tensor:
        flat = torch.from_file(str(path), shared=True, size=math.prod(self._shape), dtype=torch.float32)
        return flat.view(self._shape)

    def _keep(self, index: int) -> None:
        """Rename the complete new file so that another run finds it, then remove the old one."""
        old, self.index = self.index, index
        if self._folder is not None:
            sync(self._folder / "new")
            (self._folder / "new").replace(self._path(index))
            sync(self._folder)
            if old != index:
                self._path(old).unlink()

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"into_layer_{index:02d}.float32"


def states_bytes(tokens: int, config: PreTrainedConfig) -> int:
    """Bytes of the hidden states that enter one layer."""
    return tokens * config.hidden_size * torch.float32.itemsize


def check_room(folder: Path, tokens: int, config: PreTrainedConfig, kept: Iterable[Path]) -> None:
    """Raise SurgeryError if the disk of `folder` has no room for the states of two layers.

    The space of the files in `kept` counts as free, because the run uses or replaces these files.
    """
    needed_bytes = 2 * states_bytes(tokens, config) - sum(path.stat().st_size for path in kept)
    free_bytes = shutil.disk_usage(existing_parent(folder)).free
    if needed_bytes > free_bytes:
        raise SurgeryError(
            f"The hidden states of {tokens:,} tokens, width {config.hidden_size}, are kept on the disk and need "
            f"{decimal(needed_bytes)} in {folder}, but only {decimal(free_bytes)} are free there. Give fewer --tokens, "
            "or an --output_dir on a larger disk. If the memory is large enough, --memory_limit "
            f"{math.ceil(states_bytes(tokens, config) / 1e9)} also helps."
        )
