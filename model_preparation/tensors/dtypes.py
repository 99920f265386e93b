"""Dtypes by name, so that tensors in files can be found and copied without importing torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """A dtype as torch names it ("bfloat16"), and the bytes of one number."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"

    @property
    def torch(self) -> "torch.dtype":
        """torch's object for it."""
        import torch

        return getattr(torch, self.name)


def dtype_of(dtype: "DType | torch.dtype") -> DType:
    """The same dtype without torch."""
    return dtype if isinstance(dtype, DType) else DType(str(dtype).removeprefix("torch."), dtype.itemsize)
