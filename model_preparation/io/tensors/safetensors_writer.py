"""Copies tensors from their files into a safetensors file, a few blocks at a time, and computes its digests.

The same tensors give the same bytes. Source of the layout: github.com/huggingface/safetensors, README, "Format".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from model_preparation.io.block_io import ALIGNMENT, Advance
from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.tensor_ranges import SAFETENSORS_DTYPES, StoredTensor
from model_preparation.io.tensors.tensor_stream import streaming

_NAME_OF = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write.

    Attributes:
        file: the file's name.
        ranges: where its tensors come from, by name.
        dtype: the dtype of every tensor in the file. Tensors of another dtype are cast.
    """

    file: str
    ranges: Mapping[str, StoredTensor]
    dtype: DType

    @property
    def size_bytes(self) -> int:
        """The size of the whole file."""
        return len(self.header) + sum(self._bytes_of(name) for name in self.ranges)

    @cached_property
    def header(self) -> bytes:
        """Everything before the tensors, padded with spaces, as the format allows."""
        fields: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self._order:
            end = position + self._bytes_of(name)
            shape = list(self.ranges[name].shape)
            fields[name] = {"dtype": _NAME_OF[self.dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(fields, separators=(",", ":")).encode()
        padded_bytes = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
        return padded_bytes.to_bytes(8, "little") + text.ljust(padded_bytes)

    def write(self, path: Path, advance: Advance = lambda size_bytes: None) -> tuple[dict, dict[str, str]]:
        """Write the file to `path` and sync it. Return {"bytes": size, "sha256": digest}, and BLAKE3 by tensor name.

        Args:
            advance: called for each piece, when it is written.

        Raises:
            OSError: from the file system: disk full, input/output error.
        """
        digests = {}
        with streaming([path], self.size_bytes, advance) as stream:
            stream.append(self.header)
            for name in self._order:
                _, digests[name] = stream.copy(self.ranges[name].cast(self.dtype), self._bytes_of(name))
            return stream.finish(), digests

    @property
    def _order(self) -> list[str]:
        """The names in the file's order.

        Tensors whose size is a multiple of ALIGNMENT come first. So each of these also starts at a multiple.
        """
        return sorted(self.ranges, key=lambda name: (self._bytes_of(name) % ALIGNMENT != 0, name))

    def _bytes_of(self, name: str) -> int:
        return self.ranges[name].numel * self.dtype.itemsize
