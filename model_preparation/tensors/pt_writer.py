"""Files in the format of torch.save, without having the tensors in memory.

In: objects whose tensors are placeholders (`placeholder`), and where each tensor's bytes come from. Out: files that
torch.load reads, written at the speed of the disk: every source block is read once and goes into all files that hold
that tensor, while SHA-256, the zip's CRC-32 and each tensor's BLAKE3 are worked out on the way. A few blocks are in
memory at a time, whatever the model's size. `pt_skeleton` says what the files look like.
"""

import contextlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_preparation.files.block_io import Advance, Buffers, OutputFile, Stream
from model_preparation.tensors.pt_skeleton import Skeleton, Storage, storages_of
from model_preparation.tensors.tensor_copy import TensorSource, copy_tensor


@dataclass(frozen=True)
class Written:
    """What `write_together` wrote.

    Attributes:
        files: {"bytes": size, "sha256": digest} per path.
        blake3: of every tensor that came from a source, by its placeholder's `data_ptr()`.
    """

    files: dict[Path, dict]
    blake3: dict[int, str]


def placeholder(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor with a storage of its own that is address space only: nothing may read or write it."""
    return torch.empty(tuple(shape), dtype=dtype)


def write_together(
    contents: Mapping[Path, Any],
    sources: Mapping[int, TensorSource],
    advance: Advance = lambda size_bytes: None,
) -> Written:
    """Write each of `contents` to its path, for `torch.load`, and sync it.

    Args:
        contents: an object per path.
        sources: by `data_ptr()` of a placeholder's storage, its bytes; every other tensor is taken from memory.
        advance: told the bytes of every piece written.

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    shared = _in_all([storages_of(content) for content in contents.values()])
    skeletons = [Skeleton(content, shared) for content in contents.values()]
    written = Written({}, {})
    with contextlib.ExitStack() as stack:
        files = []
        for path, skeleton in zip(contents, skeletons, strict=True):
            files.append(OutputFile(path, skeleton.size_bytes, advance))
            stack.callback(files[-1].close)
        writers = stack.enter_context(ThreadPoolExecutor(len(files) + 1, "writing"))
        task = _Task(sources, Buffers(), written)
        count = sum(1 for storage in shared if storage.nbytes())
        together = Stream(files, writers)
        together.reserve()
        task.copy(together, skeletons, range(count))
        for stream, skeleton in zip(together.split(), skeletons, strict=True):
            task.copy(stream, [skeleton], range(count, len(skeleton.storages)))
            stream.append(skeleton.gap(len(skeleton.storages)))
            written.files[stream.files[0].path] = stream.finish()
    return written


@dataclass(frozen=True)
class _Task:
    sources: Mapping[int, TensorSource]
    buffers: Buffers
    written: Written

    def copy(self, stream: Stream, skeletons: list[Skeleton], indices: range) -> None:
        """Append tensors, each with the gap before it; they are alike in all `skeletons`."""
        for index in indices:
            gap = skeletons[0].gap(index)
            storage = skeletons[0].storages[index]
            if any(other.gap(index) != gap or other.storages[index] is not storage for other in skeletons):
                raise RuntimeError("files that should begin alike do not")
            stream.append(gap)
            crc = self._copy_storage(stream, storage)
            for skeleton in skeletons:
                skeleton.fill_in(index, crc)

    def _copy_storage(self, stream: Stream, storage: Storage) -> int:
        pointer = storage.data_ptr()
        copied = copy_tensor(self.sources.get(pointer) or _InMemory(storage), storage.nbytes(), stream, self.buffers)
        if pointer in self.sources:
            self.written.blake3[pointer] = copied.blake3
        return copied.crc


class _InMemory:
    place = None

    def __init__(self, storage: Storage):
        self._bytes = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # type: ignore[arg-type]

    def read_into(self, view: memoryview, start: int) -> None:
        view[:] = self._bytes[start : start + len(view)]


def _in_all(lists: list[list[Storage]]) -> list[Storage]:
    """What is in all the lists, in the order of the first."""
    keys = [{storage._cdata for storage in storages} for storages in lists]
    return [storage for storage in lists[0] if all(storage._cdata in others for others in keys)]
