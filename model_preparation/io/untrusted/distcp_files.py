"""Checks a folder of torch.distributed.checkpoint before torch unpickles the files in it.

torch reads the tensors in `.distcp` shards with weights_only. But it reads `.metadata` and all other values (numbers of
the optimizer) without weights_only.

Source of the format: torch/distributed/checkpoint/filesystem.py (FileSystemReader) and metadata.py.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from model_preparation.io.untrusted.pickle_check import MAX_PICKLE_BYTES, TENSORS
from model_preparation.io.untrusted.pt_check import check_archive
from model_preparation.io.untrusted.untrusted_files import inside, regular_file

SHARD_METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
# Unpickling damaged bytes raises one of these.
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, TypeError, AttributeError, LookupError),
    *(RecursionError, ArithmeticError, NotImplementedError),
)
_MAX_ENTRY_BYTES = 1_000_000  # for an entry that is not a tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:  # exact pairs: a dotted name could lead out of a class
            raise ValueError(f"it names {ascii(f'{module}.{name}')[1:-1]:.100}, which could run code")
        return super().find_class(module, name)


def check_shards(folder: Path) -> None:
    """Check everything that torch would unpickle in a folder of shards.

    Raises:
        ValueError: for a global that such a folder does not need (the error names it), or for a file or
            entry that is damaged or too large.
        SurgeryError, OSError: as from `regular_file` and `inside`.
    """
    for name, (file_name, offset, size_bytes) in _entries(regular_file(folder / SHARD_METADATA)).items():
        path = regular_file(inside(folder, file_name))
        if not 0 < size_bytes <= _MAX_ENTRY_BYTES:
            raise ValueError(
                f"its entry {name!a:.100} has {size_bytes} bytes; an entry without a tensor has 1 to {_MAX_ENTRY_BYTES}"
            )
        with path.open("rb") as file:
            file.seek(offset)
            entry = file.read(size_bytes)
        try:
            check_archive(io.BytesIO(entry), len(entry), TENSORS)
        except ValueError as error:
            raise ValueError(f"its entry {name!a:.100} in {file_name}: {error}") from error


def _entries(path: Path) -> dict[str, tuple[str, int, int]]:
    """The place of each entry that is not a tensor, by name: (file name, offset in bytes, size in bytes)."""
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than {MAX_PICKLE_BYTES // 1_000_000} MB")
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        kinds = {name: type(kind) for name, kind in metadata.state_dict_metadata.items()}
        return {
            index.fqn: (place.relative_path, int(place.offset), int(place.length))
            for index, place in metadata.storage_data.items()
            if kinds[index.fqn] is BytesStorageMetadata
        }
    except _DAMAGED as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
