"""Refuses quantised models. The error names the method if the config or the tensors' names show it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model_preparation.errors import SurgeryError

GIVE_UNQUANTISED = "Give the unquantised model that it was made from, in bfloat16, float16 or float32."

_TITLES = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (fbgemm)"}
# Endings of tensor names in quantised files; the first match counts.
_ENDINGS = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8",
}


def method_in_config(fields: Mapping[str, Any]) -> str | None:
    """The quantisation method that a config names; None if the config has no `quantization_config`."""
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization:
        return None
    # Old files of bitsandbytes name no method.
    method = str(quantization.get("quant_method", "bitsandbytes"))
    return _TITLES.get(method.lower(), f"{method!r:.40}")


def refusal(path: Path, dtype: str, names: Iterable[str]) -> SurgeryError:
    """The error for a file or folder with tensors of a dtype that no model can run in.

    Args:
        dtype: the dtype's name in the file.
        names: the names of all tensors in the file or folder.
    """
    method = method_in_names(names) or ("FP8" if dtype.lower().startswith(("f8", "float8")) else None)
    how = f", quantised by {method}" if method else ""
    return SurgeryError(f"{path} holds {dtype} numbers{how}. {GIVE_UNQUANTISED}")


def method_in_names(names: Iterable[str]) -> str | None:
    """The quantisation method that names of tensors show; None if they show none of the known methods."""
    listed = tuple(names)
    return next((title for end, title in _ENDINGS.items() if any(name.endswith(end) for name in listed)), None)
