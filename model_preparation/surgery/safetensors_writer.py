"""A safetensors file, written from where its tensors lie and without loading them.

In: per tensor a `TensorRange`, and the dtype all shall have. Out: a file whose bytes depend on the tensors alone,
hashed while it is written. Source of the layout: github.com/huggingface/safetensors, README, "Format".
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from model_preparation.surgery.pt_writer import Output
from model_preparation.surgery.tensor_ranges import SAFETENSORS_DTYPES, TensorRange

_NAME_OF = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_DATA_ALIGNMENT = 4096  # where file systems can share extents, they share whole blocks of this size


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be.

    Attributes:
        file: its name.
        ranges: where its tensors come from, by name.
        dtype: of every tensor in it; what has another is cast on the way.
    """

    file: str
    ranges: Mapping[str, TensorRange]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(self._bytes_of(name) for name in self.ranges)

    @cached_property
    def header(self) -> bytes:
        """Everything before the tensors, which lie sorted by name; padded with spaces, as the format allows."""
        fields: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in sorted(self.ranges):
            end = position + self._bytes_of(name)
            shape = list(self.ranges[name].shape)
            fields[name] = {"dtype": _NAME_OF[self.dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(fields, separators=(",", ":")).encode()
        padded_bytes = -(-(8 + len(text)) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT - 8
        return padded_bytes.to_bytes(8, "little") + text.ljust(padded_bytes)

    def write(self, path: Path, advance: Callable[[int], None] = lambda size_bytes: None) -> dict:
        """Write the file to `path` and sync it; returns {"bytes": size, "sha256": digest}.

        Args:
            advance: told the bytes of every piece written.

        Raises:
            OSError: from the file system: disk full, input/output error.
        """
        path.touch()
        with Output(path, self.size_bytes, advance) as output:
            output.write(memoryview(self.header))
            for name in sorted(self.ranges):
                for block in self.ranges[name].blocks(self.dtype):
                    output.write(block)
            return output.finish()

    def _bytes_of(self, name: str) -> int:
        return self.ranges[name].shape.numel() * self.dtype.itemsize
