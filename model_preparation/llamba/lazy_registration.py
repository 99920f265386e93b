"""Registers the model with transformers and torch as soon as other code imports one of the two.

Registering imports both, which takes seconds. So `import model_preparation` registers the model at once only
if one of the two is imported already.
"""

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# While one of these packages is half imported, the model cannot be registered: transformers or torch may be incomplete.
_WATCHED = {"torch", "transformers", "accelerate", "safetensors", "peft", "torchvision", "kernels", "model_preparation"}


class _Watch:
    """A finder for `sys.meta_path`. It asks the other finders, and notices when all imports of `_WATCHED` end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0  # how many imports of these packages are running, in all threads

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in _WATCHED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = functools.partial(self._execute, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        with self._lock:
            self._running += 1
        try:
            execute(module)
        finally:
            with self._lock:
                self._running -= 1
                is_outermost = self._running == 0
        if is_outermost and self in sys.meta_path and _is_imported():
            register_never()
            _register()


_watch = _Watch()


def register_when_needed() -> None:
    """Register the model now if torch or transformers is imported already, otherwise as soon as one of them is."""
    if _is_imported():
        _register()
    elif _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)


def register_never() -> None:
    """Stop waiting. Commands call this, because they import the model themselves if they need it."""
    if _watch in sys.meta_path:
        sys.meta_path.remove(_watch)


def _is_imported() -> bool:
    return "torch" in sys.modules or "transformers" in sys.modules


def _register() -> None:
    importlib.import_module("model_preparation.llamba.registration")
