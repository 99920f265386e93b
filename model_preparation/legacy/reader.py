"""The process that reads pickled decoder layers. It restricts itself first. reader_process.py starts it.

The only argument is the folder to write to; each line on stdin is a file's path as JSON. First the process prints a
JSON line with the restrictions that hold. For each file, it writes layer.safetensors into the folder, with
tensor names as in LlamaDecoderLayer. Then it prints a JSON line: attributes of the pickled objects, or
{"fault": why the file is no layer}.

Nothing in the pickle is run. torch and Python build tensors and containers. Any other object becomes a `StandIn`,
which keeps the object's attributes and does nothing. So classes that transformers no longer has (LlamaSdpaAttention)
are no problem. The restrictions protect the user if this code has a mistake.
"""

import json
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from model_preparation.legacy import sandbox

LAYER = "layer.safetensors"

# Only these globals and dtypes are used as they are. torch's loader handles typed storages itself.
_REAL = {
    "__builtin__.set",
    "builtins.set",
    "collections.OrderedDict",
    "torch.Size",
    "torch.UntypedStorage",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
    "torch.storage.UntypedStorage",
}
# Replacements for the globals that make parameters from tensors: they return the tensors.
_PARAMETER_BUILDERS = {
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, *_: rebuild(*arguments),
}
_USUAL = re.compile(r"(torch|transformers|accelerate|functools|collections)\.")
_DTYPE = re.compile(r"torch\.(bool|u?int\d+|b?float\d+)")


def is_usual(name: str) -> bool:
    """Whether decoder layers usually name this global."""
    return name in _REAL or _USUAL.match(name) is not None


class StandIn:
    """Replaces an object whose class must not run. It has the object's attributes and no behaviour."""

    path = ""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) else (state,):  # a tuple if the class has __slots__
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __call__(self, *args, **kwargs):
        return StandIn()

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass

    add = append
    update = extend


class Unpickler(pickle.Unpickler):
    """Builds tensors and containers, and a StandIn for all else. `replaced` has the replaced names."""

    replaced: ClassVar[set[str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in _REAL or _DTYPE.fullmatch(path):
            return super().find_class(module, name)
        if path in _PARAMETER_BUILDERS:
            return _PARAMETER_BUILDERS[path]
        self.replaced.add(path)
        return type(name, (StandIn,), {"path": path})


def read_layer(path: Path, output: Path) -> dict[str, Any]:
    """Write the tensors of the layer in the file `path` into the safetensors file `output`.

    Returns:
        "config": the fields of its LlamaConfig, or None; "attention": the plain attributes of its attention; "eps":
        the epsilon of its input norm, or None; "not_run": globals that no layer needs.

    Raises:
        ValueError: if the file does not hold a LlamaDecoderLayer.
    """
    import torch
    from safetensors.torch import save_file

    Unpickler.replaced.clear()
    pickle_module = types.ModuleType("pickle_of_stand_ins")
    vars(pickle_module).update(Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load())
    layer = torch.load(
        path,
        map_location="cpu",
        mmap=zipfile.is_zipfile(path),
        pickle_module=pickle_module,
        weights_only=False,
    )
    modules = vars(layer).get("_modules", {}) if isinstance(layer, StandIn) else {}
    if "self_attn" not in modules:
        kind = type(layer).path if isinstance(layer, StandIn) else type(layer).__name__
        inside = ", ".join(str(name)[:40] for name in list(modules or (layer if isinstance(layer, dict) else ()))[:3])
        raise ValueError(f"it holds {kind}{f' of {inside}' if inside else ''}, not a LlamaDecoderLayer")
    save_file(_tensors(layer), output)
    norm = vars(modules.get("input_layernorm", StandIn()))
    attention = vars(modules["self_attn"])
    config = next((vars(holder["config"]) for holder in (attention, vars(layer)) if "config" in holder), None)
    return {
        "config": None if config is None else _plain(config),
        "attention": _plain(attention),
        "eps": norm.get("variance_epsilon", norm.get("eps")),
        "not_run": sorted(name for name in Unpickler.replaced if not is_usual(name)),
    }


def _tensors(layer: StandIn) -> dict[str, Any]:
    """The layer's parameters and buffers by their names in LlamaDecoderLayer. A tensor with two names appears once."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, tensor in _named(layer, ""):
        own = re.sub(r"^mixer\.", "self_attn.", name)
        own = re.sub(r"^(self_attn\.)?out_proj\.", "self_attn.o_proj.", own)
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"its {name} is not a plain tensor with values")
        if own not in found:
            # safetensors takes no views of larger storages.
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
            found[own] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        elif not _same(tensor, found[own]):
            raise ValueError(f"its {name} is another name for {own}, but holds other numbers")
    return found


def _named(module: StandIn, prefix: str) -> Iterator[tuple[str, Any]]:
    for table in ("_parameters", "_buffers"):
        for name, tensor in vars(module).get(table, {}).items():
            if tensor is not None:
                yield prefix + name, tensor
    for name, child in vars(module).get("_modules", {}).items():
        if child is not None:
            yield from _named(child, f"{prefix}{name}.")


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors have equal bits. Unlike with ==, NaN equals itself."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _plain(value: Any) -> Any:
    """The value as JSON: numbers, text, lists, dicts, and dtypes by name; None for everything else."""
    import torch

    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items() if isinstance(key, str) and not key.startswith("_")}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, (bool, int, float, str)) else None


def main() -> None:
    folder = Path(sys.argv[1])
    answers = sys.stdout
    sys.stdout = sys.stderr  # only answers go to the real stdout
    print(json.dumps(sandbox.enter(folder)), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = read_layer(Path(json.loads(line)), folder / LAYER)
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, EOFError, OSError) as error:
            answer = {"fault": str(error) or type(error).__name__}
        except pickle.UnpicklingError as error:
            answer = {"fault": f"its pickle is damaged: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
