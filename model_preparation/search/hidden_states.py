"""The base's hidden states before every layer: in memory up to a limit, then in a memory-mapped file.

The file has no name. So the system removes the file when the process ends, even if it is killed.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from rich.filesize import decimal
from torch import Tensor

from model_preparation.errors import SurgeryError
from model_preparation.io.complete_folder import check_space

_ALIGNMENT = 64  # bytes; torch aligns its own tensors in the same way


class HiddenStates:
    """Tensors by (layer, batch).

    Args:
        memory_bytes: how many bytes may be in memory.
        total_bytes: the size of all tensors together.
        folder: where the file goes, if it is needed.

    Raises:
        SurgeryError: if the disk has no room for the file.
    """

    def __init__(self, memory_bytes: int, total_bytes: int, folder: Path):
        self._memory_left = memory_bytes
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._map: mmap.mmap | None = None
        self._used = 0
        if total_bytes > memory_bytes:
            # Room for all tensors: no tensor is split, so memory may hold none of them.
            self._map = _map_new_file(folder, total_bytes)

    def put(self, layer: int, batch: int, states: Tensor) -> None:
        """Keep hidden states of any shape and dtype, from any device."""
        if states.nbytes <= self._memory_left:
            self._memory_left -= states.nbytes
            self._tensors[layer, batch] = states.cpu()
            return
        assert self._map is not None
        kept = torch.frombuffer(self._map, dtype=states.dtype, count=states.numel(), offset=self._used)
        kept.copy_(states.cpu().reshape(-1))
        self._used += -(-states.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._tensors[layer, batch] = kept.view(states.shape)

    def get(self, layer: int, batch: int, device: torch.device) -> Tensor:
        """The hidden states on `device`, with the same bits. The caller must not change them in place."""
        return self._tensors[layer, batch].to(device)


def _map_new_file(folder: Path, size_bytes: int) -> mmap.mmap:
    folder.mkdir(parents=True, exist_ok=True)
    size_bytes += 4096 * _ALIGNMENT  # for the gaps that alignment leaves
    try:
        check_space(folder, size_bytes)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # a full disk is an error now, and not SIGBUS later
            return mmap.mmap(file.fileno(), size_bytes)
    except (SurgeryError, OSError) as error:
        raise SurgeryError(
            f"{folder} has no space for {decimal(size_bytes)} of hidden states ({error}). Allow more memory by "
            "--boundary_memory, or ask fewer questions by --limit."
        ) from error
