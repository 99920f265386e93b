"""One tensor's bytes from where they are into a `Stream`, with the digests of the tensor.

In: a `TensorSource`. Out: its bytes in the stream's files, read once, a block at a time; CRC-32 and BLAKE3.
"""

from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3
from zlib_ng.zlib_ng import crc32

from model_preparation.io import block_io
from model_preparation.io.block_io import Buffers, Place, Stream


class TensorSource(Protocol):
    """Where a tensor's bytes, in C order, come from.

    `place`: where they lie as they are in a file, if they do.
    """

    @property
    def place(self) -> Place | None: ...

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the tensor's bytes from `start` on."""


@dataclass(frozen=True)
class Copied:
    """CRC-32 and BLAKE3 (in hex) of a tensor's bytes."""

    crc: int
    blake3: str


def copy_tensor(source: TensorSource, size_bytes: int, stream: Stream, buffers: Buffers) -> Copied:
    """Append the tensor; what its file can share with the stream's files on the disk is read for the digests only.

    Raises:
        OSError: from the file system: disk full, input/output error, a source that ends early.
    """
    shared = source.place is not None and stream.share(source.place, size_bytes)
    crc, digest = 0, blake3()
    for start in range(0, size_bytes, block_io.BLOCK_BYTES):
        with buffers.take(min(block_io.BLOCK_BYTES, size_bytes - start)) as (view, users):
            source.read_into(view, start)
            users += stream.append_block(view, shared=shared)
            crc = crc32(view, crc)
            digest.update(view)
    return Copied(crc, digest.hexdigest())
