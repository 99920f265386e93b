"""Dtypes by name, without importing torch. Quantised models are refused, and the error names their method."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_preparation.errors import SurgeryError

if TYPE_CHECKING:
    import torch

MODEL_DTYPES = ("float32", "bfloat16", "float16")  # a model can run in these
_FLOAT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

GIVE_UNQUANTISED = "Give the unquantised model that it was made from, in bfloat16, float16 or float32."

_TITLES = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (fbgemm)"}
# Endings of tensor names in quantised files; the first that fits counts.
_ENDINGS = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8",
}


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
    """`float_dtype` as torch's object."""
    found = float_dtype(dtype)
    return None if found is None else found.torch


def method_in_config(fields: Mapping[str, Any]) -> str | None:
    """The method in a config's `quantization_config`; None if there is none."""
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization:
        return None
    # Old files of bitsandbytes name no method.
    method = str(quantization.get("quant_method", "bitsandbytes"))
    return _TITLES.get(method.lower(), f"{method!r:.40}")


def refusal(path: Path, dtype: str, names: Iterable[str]) -> SurgeryError:
    """The error for a file or folder with tensors of a dtype that no model can run in.

    Args:
        dtype: the file's name for it.
        names: the names of all tensors there.
    """
    method = method_in_names(names) or ("FP8" if dtype.lower().startswith(("f8", "float8")) else None)
    how = f", quantised by {method}" if method else ""
    return SurgeryError(f"{path} holds {dtype} numbers{how}. {GIVE_UNQUANTISED}")


def method_in_names(names: Iterable[str]) -> str | None:
    """The method that gives tensors such names; None if no known one does."""
    listed = tuple(names)
    return next((title for end, title in _ENDINGS.items() if any(name.endswith(end) for name in listed)), None)
