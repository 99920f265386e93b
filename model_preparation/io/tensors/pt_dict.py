"""A dict of tensors in torch.save's format, written and read without torch.

Source: PyTorch's torch/_tensor.py (`__reduce_ex__`) and torch/serialization.py (the persistent ids).
"""

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from model_preparation.io.tensors.dtypes import DType
from model_preparation.io.tensors.pt_archive import SortingPickler
from model_preparation.io.tensors.tensor_ranges import CastTensor, StoredTensor, TensorRange
from model_preparation.io.untrusted.pickle_check import DTYPE_OF_STORAGE, TENSORS
from model_preparation.io.untrusted.pt_check import PICKLE, check_pt, pt_records, reading_tensors


@dataclass(frozen=True)
class _Storage:
    """The fields of a persistent id."""

    dtype: DType
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """The arguments of torch's `_rebuild_tensor_v2`."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


# Stand-ins under torch's names.
_rebuild_tensor_v2.__module__ = "torch._utils"
_STORAGES = {
    dtype: type(name.removeprefix("torch."), (), {"__module__": "torch"}) for name, dtype in DTYPE_OF_STORAGE.items()
}
_GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "collections.OrderedDict": OrderedDict,
    **DTYPE_OF_STORAGE,
}


def pickled_dict(tensors: Mapping[str, StoredTensor | CastTensor]) -> bytes:
    """data.pkl of the dict; the tensors' storages are numbered in its order."""
    content = {
        name: _Tensor(
            _Storage(tensor.dtype, str(number), tensor.size_bytes // tensor.dtype.itemsize),
            0,
            tuple(tensor.shape),
            _strides(tensor.shape),
        )
        for number, (name, tensor) in enumerate(tensors.items())
    }
    buffer = io.BytesIO()
    _DictPickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def dict_ranges(path: Path, cure: str) -> dict[str, TensorRange]:
    """Where the tensors lie in a file with a dict of whole tensors, each with a storage of its own.

    Raises:
        SurgeryError: if it holds anything else; the message ends with `cure`.
    """
    with reading_tensors(path, cure):
        check_pt(path, TENSORS)
        records = pt_records(path)
        with path.open("rb") as file:

            def read(name: str) -> bytes:
                file.seek(records[name].start)
                return file.read(records[name].size_bytes)

            content = _DictUnpickler(io.BytesIO(read(PICKLE))).load()
            if "byteorder" in records and read("byteorder") != sys.byteorder.encode():
                raise ValueError("its numbers have the other byte order")
        stored = {name for name in records if name.startswith("data/")}
        found = {}
        for name, tensor in content.items():
            record = f"data/{tensor.storage.key}"
            if not isinstance(name, str) or record not in stored:
                raise ValueError("it holds other things than whole tensors by name, each stored once")
            stored.remove(record)
            found[name] = TensorRange(path, records[record].start, tensor.shape, tensor.storage.dtype)
            whole = tensor.offset == 0 and tensor.stride == _strides(tensor.shape)
            if not whole or found[name].size_bytes != records[record].size_bytes:
                raise ValueError(f"{name:.100} is only a part or a view of its storage")
        if stored:
            raise ValueError("it holds numbers that no tensor uses")
    return found


class _DictPickler(SortingPickler):
    dispatch = SortingPickler.dispatch.copy()

    def persistent_id(self, obj: Any) -> tuple | None:
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None

    def _save_tensor(self, obj: _Tensor) -> None:
        hooks: OrderedDict = OrderedDict()
        self.save_reduce(_rebuild_tensor_v2, (obj.storage, obj.offset, obj.shape, obj.stride, False, hooks), obj=obj)

    def _save_name(self, obj: type | FunctionType) -> None:
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[_Tensor] = _save_tensor
    dispatch[FunctionType] = dispatch[type] = _save_name


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
