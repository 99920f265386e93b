"""Dtypes by name, without importing torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model_preparation.errors import SurgeryError

if TYPE_CHECKING:
    import torch

MODEL_DTYPES = ("float32", "bfloat16", "float16")  # a model can run in these
_FLOAT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DType:
    """A dtype: torch's name for it ("bfloat16"), and the bytes of one number."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"

    @property
    def torch(self) -> "torch.dtype":
        """This dtype as torch's object."""
        import torch

        return getattr(torch, self.name)


def dtype_of(dtype: "DType | torch.dtype") -> DType:
    """torch's dtype as a `DType`."""
    return dtype if isinstance(dtype, DType) else DType(str(dtype).removeprefix("torch."), dtype.itemsize)


def float_dtype(dtype: "DType | torch.dtype | str | None") -> DType | None:
    """A floating-point dtype from torch's object or its name ("bfloat16"); None for None.

    Raises:
        SurgeryError: for any other dtype.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOAT_BYTES:
        raise SurgeryError(f"No model can have the dtype {dtype!r:.80}. Use {', '.join(MODEL_DTYPES)}.")
    return DType(name, _FLOAT_BYTES[name])


def torch_dtype(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    """As `float_dtype`, but returns torch's object."""
    found = float_dtype(dtype)
    return None if found is None else found.torch
