"""Lets older programs import modules by their paths of version 0.2, with a warning. Version 0.6 will remove this."""

import importlib
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "model_preparation."
# {path in 0.2: (path now, {a function's name in 0.2: its name now, if it has another})}
_NOW: dict[str, tuple[str, dict[str, str]]] = {
    "batch.jobs": ("jobs.jobs", {}),
    "comparison.compare": ("evaluation.compare.compare", {}),
    "files.digests": ("io.digests", {}),
    "files.new_folder": ("io.complete_folder", {}),
    "files.seal": ("io.self_checksum", {"seal": "with_checksum", "check_seal": "checksum_fault"}),
    "sharing.share": ("checkpoint.share", {"plan_share": "plan_upload", "upload_share": "upload"}),
    "surgery.checkpoint": ("checkpoint.build", {}),
    "surgery.checkpoint_info": ("checkpoint.checkpoint_info", {}),
    "surgery.checkpoint_loading": ("checkpoint.load", {}),
    "surgery.graft": ("checkpoint.graft_parts", {}),
    "surgery.layer_store": ("checkpoint.layer_store", {}),
    "surgery.recipe": ("checkpoint.rebuild", {"rebuild": "rebuild_checkpoint"}),
    "surgery.sources": ("hub.sources", {}),
    "training.distill": ("train.distill.distill", {}),
    "training.heal": ("train.heal.heal", {}),
    "verification.verify": ("checkpoint.verify", {}),
}


class EarlierNames:
    """A finder and loader for `sys.meta_path`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        inner = name.removeprefix(_PACKAGE)
        is_package = any(module.startswith(f"{inner}.") for module in _NOW)
        if inner == name or not (is_package or inner in _NOW):
            return None
        return ModuleSpec(name, self, is_package=is_package)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__.removeprefix(_PACKAGE) in _NOW:
            path, names = _NOW[module.__name__.removeprefix(_PACKAGE)]
            message = f"{module.__name__} is now {_PACKAGE}{path}. Version 0.6 will remove the old path."
            warnings.warn(message, FutureWarning, stacklevel=2)
            now = importlib.import_module(_PACKAGE + path)
            module.__dict__["__getattr__"] = lambda name: getattr(now, names.get(name) or name)
