"""Makes the pickle of a torch.save file with a dict of tensors, and finds the tensors in such a file.

This module does not need torch.

Source: PyTorch's torch/_tensor.py (`__reduce_ex__`) and torch/serialization.py (the persistent ids).
"""

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.pt_archive import SortingPickler
from model_preparation.io.tensors.tensor_ranges import CastTensor, StoredTensor, TensorRange
from model_preparation.io.untrusted.pickle_check import DTYPE_OF_STORAGE, TENSORS
from model_preparation.io.untrusted.pt_check import PICKLE, check_pt, pt_records, reading_tensors


class _Storage(NamedTuple):
    """The fields of a storage's persistent id."""

    dtype: DType
    key: str
    numel: int


class _Tensor(NamedTuple):
    """The arguments of torch's `_rebuild_tensor_v2`."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: OrderedDict


def _stand_in(name: str) -> type:
    """A class that the pickler writes as the global `name`."""
    module, _, own_name = name.rpartition(".")
    return type(own_name, (), {"__module__": module})


_REBUILD = "torch._utils._rebuild_tensor_v2"
_REBUILDER = _stand_in(_REBUILD)
_STORAGES = {dtype: _stand_in(name) for name, dtype in DTYPE_OF_STORAGE.items()}
_GLOBALS: dict[str, Any] = {_REBUILD: _Tensor, "collections.OrderedDict": OrderedDict, **DTYPE_OF_STORAGE}


def pickled_dict(tensors: Mapping[str, StoredTensor | CastTensor]) -> bytes:
    """data.pkl of a dict of tensors; their storages are numbered in the dict's order."""
    content = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        storage = _Storage(tensor.dtype, str(number), tensor.size_bytes // tensor.dtype.itemsize)
        content[name] = _Tensor(storage, 0, tuple(tensor.shape), _strides(tensor.shape), False, OrderedDict())
    buffer = io.BytesIO()
    _DictPickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def dict_ranges(path: Path, advice: str) -> dict[str, TensorRange]:
    """Where the tensors lie, by name, in a file with a dict of tensors. Each tensor must fill a storage of its own.

    Raises:
        SurgeryError: if the file holds anything else; the message ends with `advice`.
    """
    with reading_tensors(path, advice):
        check_pt(path, TENSORS)
        records = pt_records(path)
        with path.open("rb") as file:

            def read(name: str) -> bytes:
                file.seek(records[name].start)
                return file.read(records[name].size_bytes)

            content = _DictUnpickler(io.BytesIO(read(PICKLE))).load()
            if "byteorder" in records and read("byteorder") != sys.byteorder.encode():
                raise ValueError("its byte order is not this machine's")
        stored = {name for name in records if name.startswith("data/")}
        found = {}
        for name, tensor in content.items():
            record = f"data/{tensor.storage.key}"
            if not isinstance(name, str) or record not in stored:
                raise ValueError("it holds something that is not a tensor with its own name and storage")
            stored.remove(record)
            found[name] = TensorRange(path, records[record].start, tensor.shape, tensor.storage.dtype)
            whole = tensor.offset == 0 and tensor.stride == _strides(tensor.shape)
            if not whole or found[name].size_bytes != records[record].size_bytes:
                raise ValueError(f"{name:.100} is only a part or a view of its storage")
        if stored:
            raise ValueError("it holds a storage that no tensor uses")
    return found


class _DictPickler(SortingPickler):
    dispatch = SortingPickler.dispatch.copy()

    def persistent_id(self, obj: Any) -> tuple | None:
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None

    def _save_tensor(self, obj: _Tensor) -> None:
        self.save_reduce(_REBUILDER, tuple(obj), obj=obj)

    def _save_name(self, obj: type) -> None:
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[_Tensor] = _save_tensor
    dispatch[type] = _save_name


class _DictUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise ValueError(f"it names {module}.{name}, which no dict of plain tensors needs") from None

    def persistent_load(self, reference: Any) -> _Storage:
        _, dtype, key, _, numel = reference
        return _Storage(dtype, key, numel)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides[: len(shape)])
