"""The base's hidden states before every layer, kept in memory as far as allowed, then in a file that is mapped.

In: tensors, by layer and part of the questions. Out: the same bits. The file has no name, so that nothing is left of it
however the process ends.
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

_ALIGNMENT = 64  # as torch allocates


class BoundaryStore:
    """Tensors by (layer, part).

    Args:
        memory_bytes: how much of them may be in memory.
        total_bytes: how much they are together.
        folder: where the file goes; used only if they are more than `memory_bytes`.

    Raises:
        SurgeryError: if the disk has no room for what is more.
    """

    def __init__(self, memory_bytes: int, total_bytes: int, folder: Path):
        self._memory_left = memory_bytes
        self._in_memory: dict[tuple[int, int], Tensor] = {}
        self._in_file: dict[tuple[int, int], Tensor] = {}
        self._map: mmap.mmap | None = None
        self._used = 0
        if total_bytes > memory_bytes:
            # A tensor is in one of the two as a whole, so the file may have to take nearly all.
            self._map = _map_new_file(folder, total_bytes)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._in_memory or key in self._in_file

    def put(self, layer: int, part: int, states: Tensor) -> None:
        """Keep hidden states, on whatever device they are."""
        if states.nbytes <= self._memory_left:
            self._memory_left -= states.nbytes
            self._in_memory[layer, part] = states.cpu()
            return
        assert self._map is not None
        kept = torch.frombuffer(self._map, dtype=states.dtype, count=states.numel(), offset=self._used)
        kept.copy_(states.cpu().reshape(-1))
        self._used += -(-states.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._in_file[layer, part] = kept.view(states.shape)

    def get(self, layer: int, part: int, device: torch.device) -> Tensor:
        """What was kept, on `device`; it must not be written to."""
        kept = self._in_memory.get((layer, part))
        if kept is None:
            kept = self._in_file[layer, part]
        return kept.to(device)


def _map_new_file(folder: Path, size_bytes: int) -> mmap.mmap:
    folder.mkdir(parents=True, exist_ok=True)
    size_bytes += 4096 * _ALIGNMENT  # for the gaps
    try:
        check_space(folder, size_bytes)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # a full disk is an error now, not SIGBUS later
            return mmap.mmap(file.fileno(), size_bytes)
    except (SurgeryError, OSError) as error:
        raise SurgeryError(
            f"{folder} has no room for {decimal(size_bytes)} of hidden states ({error}). Allow more memory by "
            "--boundary_memory, or ask fewer questions by --limit."
        ) from error
