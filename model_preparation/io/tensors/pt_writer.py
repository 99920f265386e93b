"""Writes .pt files for `torch.load` without holding the tensors in memory.

The files are written at the speed of the disk. Every source block is read once and goes into all files. SHA-256,
CRC-32 and BLAKE3 are computed meanwhile. Only a few blocks are in memory, whatever the model's size.
The objects to save are needed only after the tensors are written. torch is needed only then, and for casts.
`pt_archive` makes everything around the tensors.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import Pickler
from typing import TYPE_CHECKING, Any

from model_preparation.io.block_io import Advance
from model_preparation.io.tensors.pt_archive import Archive, pickled
from model_preparation.io.tensors.pt_dict import pickled_dict
from model_preparation.io.tensors.tensor_stream import Stream, TensorSource, streaming

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model_preparation.io.tensors.tensor_ranges import CastTensor, StoredTensor


def write_together(
    paths: Sequence[Path],
    sources: "Mapping[str, StoredTensor | CastTensor]",
    contents: "Callable[[dict[str, Tensor]], Sequence[Any]]",
    advance: Advance = lambda size_bytes: None,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Write one object to each path, for `torch.load`, and sync the files.

    Args:
        paths: new files.
        sources: the tensors that all objects hold, by names of your choice. The files keep their order.
        contents: called after the sources are written; makes the objects. Its argument has a placeholder for each
            source, by the same name. All other tensors in the objects are written from memory.
        advance: called for every piece written; may raise.

    Returns:
        {"bytes": size, "sha256": digest} by file name, and the BLAKE3 of each source by its name.

    Raises:
        OSError: from the file system: disk full, input/output error.
    """
    with _begun(paths, sources, advance) as (beginning, blake3):
        placeholders = {name: _placeholder(source) for name, source in sources.items()}
        objects = contents(placeholders)
        first = [tensor.untyped_storage() for tensor in placeholders.values()]
        # Only the storages are used here, so pickle's fast C version is enough.
        shared = _in_all([pickled(content, pickler=Pickler)[1] for content in objects])
        others = [storage for storage in shared if storage._cdata not in {written._cdata for written in first}]
        if len(first) + len(others) != len(shared):
            raise RuntimeError("an object leaves out a tensor that is in its file")
        beginning.copy_from_memory(others)
        first += others
        files = {}
        for path, content, own in zip(paths, objects, beginning.split(), strict=True):
            data, storages = pickled(content, first)
            own.copy_from_memory(storages[len(first) :])
            files[path.name] = own.finish(data)
        return files, blake3


def write_dict(
    path: Path,
    sources: "Mapping[str, StoredTensor | CastTensor]",
    advance: Advance = lambda size_bytes: None,
) -> tuple[dict, dict[str, str]]:
    """Write a file with the dict `sources`. Return the file's description and the sources' BLAKE3.

    Only casts need torch.
    """
    with _begun([path], sources, advance) as (beginning, blake3):
        return beginning.finish(pickled_dict(sources)), blake3


@contextlib.contextmanager
def _begun(
    paths: Sequence[Path], sources: "Mapping[str, StoredTensor | CastTensor]", advance: Advance
) -> "Iterator[tuple[_Beginning, dict[str, str]]]":
    """Write the sources to new files. Yield these files, and the BLAKE3 of each source by name."""
    with streaming(paths, sum(source.size_bytes for source in sources.values()), advance) as stream:
        beginning = _Beginning(Archive(), stream)
        yield beginning, {name: beginning.copy(source, source.size_bytes) for name, source in sources.items()}


@dataclass(frozen=True)
class _Beginning:
    """Files that are written together, because all their bytes so far are the same."""

    archive: Archive
    stream: Stream

    def copy(self, source: TensorSource, size_bytes: int) -> str:
        """Append a tensor; returns its BLAKE3."""
        self.stream.append(self.archive.begin_tensor(size_bytes))
        crc, blake3 = self.stream.copy(source, size_bytes)
        self.stream.append(self.archive.finish_tensor(crc))
        return blake3

    def copy_from_memory(self, storages: "Sequence[torch.UntypedStorage]") -> None:
        """Append tensors that are in memory."""
        self.stream.reserve(sum(storage.nbytes() for storage in storages))
        for storage in storages:
            self.copy(_InMemory(storage), storage.nbytes())

    def split(self) -> "list[_Beginning]":
        """Return one `_Beginning` per file, so that the files can differ from here on."""
        return [_Beginning(self.archive.copy(), stream) for stream in self.stream.split()]

    def finish(self, pickled: bytes) -> dict:
        """Append data.pkl and the end, and sync; returns {"bytes": size, "sha256": digest}."""
        self.stream.append(self.archive.end(pickled))
        return self.stream.finish()


class _InMemory:
    place = None

    def __init__(self, storage: "torch.UntypedStorage"):
        import torch

        self._bytes = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # type: ignore[arg-type]

    def read_into(self, view: memoryview, start: int) -> None:
        view[:] = self._bytes[start : start + len(view)]


def _placeholder(source: "StoredTensor | CastTensor") -> "Tensor":
    """A tensor that stands for `source` in the pickle. Its memory is never filled, so do not read or write it."""
    import torch

    return torch.empty(source.shape, dtype=source.dtype.torch)


def _in_all(lists: "Iterable[list[torch.UntypedStorage]]") -> "list[torch.UntypedStorage]":
    """The storages that every list has, in the order of the first list."""
    first, *others = lists
    keys = [{storage._cdata for storage in storages} for storages in others]
    return [storage for storage in first if all(storage._cdata in known for known in keys)]
