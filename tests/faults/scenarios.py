"""What the faults are injected into: each way to write a folder, on models of a few kilobytes.

To add a scenario, add a line to `SCENARIOS`: a function that writes `target`, and what is at `target` before.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from model_preparation import build_checkpoint, extract_layers
from model_preparation.checkpoint.llamba_init import init_llamba_base
from model_preparation.checkpoint.model_code import update_code
from model_preparation.io.complete_folder import remove_abandoned
from model_preparation.io.digests import describe_file
from model_preparation.io.self_checksum import with_checksum
from tests.conftest import make_base, make_donor


@dataclass(frozen=True)
class Models:
    """The folders the commands read."""

    folder: Path

    @property
    def donor(self) -> Path:
        return self.folder / "donor"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def layers(self) -> Path:
        return self.folder / "layers"


def make_models(folder: Path) -> Models:
    models = Models(folder)
    make_donor(models.donor)
    make_base(models.base)
    extract_layers(str(models.donor), models.layers)
    return models


def extract(models: Models, target: Path, *, overwrite: bool, layers: tuple[int, ...] = (0, 2)) -> None:
    extract_layers(str(models.donor), target, layers=layers, overwrite=overwrite)


def build(models: Models, target: Path, *, overwrite: bool, layers: tuple[int, ...] = (1, 3)) -> None:
    build_checkpoint(str(models.base), layers, models.layers, target, overwrite=overwrite)


def build_hf(models: Models, target: Path, *, overwrite: bool, layers: tuple[int, ...] = (1, 3)) -> None:
    build_checkpoint(str(models.base), layers, models.layers, target, overwrite=overwrite, format="hf")


def init(models: Models, target: Path, *, overwrite: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    init_llamba_base(str(models.donor), target, dtype=dtype, overwrite=overwrite)


def update(models: Models, target: Path, *, overwrite: bool) -> None:
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the record of the change has a time in it
    update_code(target)


def other_code(models: Models, target: Path, *, overwrite: bool) -> None:
    """A checkpoint as another version of the package might have written it, and a result in it."""
    build_hf(models, target, overwrite=overwrite)
    (target / "mixer.py").write_text("old = True\n")
    info = json.loads((target / "checkpoint_info.json").read_text())
    info["files"]["mixer.py"] = describe_file(target / "mixer.py")
    (target / "checkpoint_info.json").write_bytes(with_checksum(info))
    (target / "evaluations").mkdir()
    (target / "evaluations" / "result.json").write_text("{}")


def clean(models: Models, target: Path, *, overwrite: bool) -> None:
    remove_abandoned(target.parent)


Write = Callable[..., None]  # (models, target, overwrite=...)


@dataclass(frozen=True)
class Scenario:
    """A run that faults are injected into.

    Attributes:
        write: what runs.
        old: makes what is at the target before; nothing is there by default.
        leftover: writes the target before, and is killed half-way; there is none by default.
        parents: missing folders between the scenario's folder and the target.
        no_exchange, no_locks: whether the file system cannot swap two folders, or cannot lock files.
    """

    write: Write
    old: Write | None = None
    leftover: Write | None = None
    parents: str = ""
    no_exchange: bool = False
    no_locks: bool = False

    def run(self, models: Models, target: Path) -> None:
        self.write(models, target, overwrite=self.old is not None)


def empty_but_for_readme(models: Models, target: Path, *, overwrite: bool) -> None:
    target.mkdir()
    (target / "README.md").write_text("Layers go here.\n")


def with_readme(write: Write) -> Write:
    """`write`, and a README.md of the user's own, which every later run must keep."""

    def write_and_add(models: Models, target: Path, *, overwrite: bool) -> None:
        write(models, target, overwrite=overwrite)
        (target / "README.md").write_text("My own notes.\n")

    return write_and_add


_old_layers = with_readme(partial(extract, layers=(1,)))
_old_checkpoint = with_readme(partial(build, layers=(2,)))
_old_hf = partial(build_hf, layers=(2,))
_old_base = with_readme(partial(init, dtype=torch.float16))

SCENARIOS = {
    "extract": Scenario(extract),
    "extract into a folder with a README": Scenario(extract, old=empty_but_for_readme),
    "extract, overwrite": Scenario(extract, old=_old_layers),
    "extract, overwrite, no exchange": Scenario(extract, old=_old_layers, no_exchange=True),
    "extract, no locks": Scenario(extract, leftover=extract, no_locks=True),
    "build": Scenario(build),
    "build into new parents": Scenario(build, parents="a/b"),
    "build over a killed build": Scenario(build, leftover=build),
    "build, overwrite": Scenario(build, old=_old_checkpoint, leftover=build),
    "build, overwrite, no exchange": Scenario(build, old=_old_checkpoint, no_exchange=True),
    "build, overwrite, no locks, no exchange": Scenario(build, old=_old_checkpoint, no_exchange=True, no_locks=True),
    "build hf": Scenario(build_hf),
    "build hf, overwrite": Scenario(build_hf, old=_old_hf),
    "init base": Scenario(init),
    "init base, overwrite": Scenario(init, old=_old_base),
    "update code": Scenario(update, old=other_code),
    "update code, no exchange": Scenario(update, old=other_code, no_exchange=True),
    "clean": Scenario(clean, old=_old_checkpoint, leftover=build),
}
