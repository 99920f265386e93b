"""A sample of the power cuts of benchmarks/power_failure.py: what a run may leave on the disk."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest

from model_preparation.io import complete_folder as module
from model_preparation.io.complete_folder import new_folder
from tests.faults.disk import FILE_SYSTEMS
from tests.faults.long_work import WORKS
from tests.faults.power import PowerSweep, Result
from tests.faults.scenarios import SCENARIOS, Scenario

MARK = "done.json"
REAL_STATES, SMALL_STATES = 180, 850
REAL = ("extract, overwrite, no exchange", "build into new parents", "build, overwrite", "build hf")
SMALL = ("write", "write, no exchange")
LONG = ("heal", "journal")


def write(models, target: Path, *, overwrite: bool, text: str = "new") -> None:
    with new_folder(target, overwrite=overwrite, marker_file=MARK) as staging:
        (staging / "sub").mkdir()
        for name in ("sub/a.txt", "b.txt", MARK):
            (staging / name).write_text(f"{name} {text}" * 400)


def write_old(models, target: Path, *, overwrite: bool) -> None:
    write(models, target, overwrite=overwrite, text="old")


def write_in_place(models, target: Path, *, overwrite: bool) -> None:
    target.mkdir(exist_ok=True)
    (target / MARK).write_text(f"{overwrite}" * 400)
    module.sync_tree(target, MARK)
    module.sync(target.parent)


def broken(by: Callable[..., None], *names: str) -> Callable[..., None]:
    """`write`, with `by` in the place of functions of model_preparation.io."""

    def write_broken(models, target: Path, *, overwrite: bool) -> None:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(patch(f"model_preparation.io.{name}", by))
            write(models, target, overwrite=overwrite)

    return write_broken


def nothing(*_) -> None:
    """No sync at all."""


def of_files(path: Path) -> None:
    if not path.is_dir():
        _fsync(path)


def of_folders(path: Path) -> None:
    if path.is_dir():
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def make_only(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


MIXED = "the target is neither the old one nor the new one"
LOST = "it was done, but the target is old"
BROKEN = {  # the sync that is left out: (how it is left out, the violation that follows)
    "files": (Scenario(broken(of_folders, "complete_file.sync")), MIXED),
    "folders": (Scenario(broken(of_files, "complete_file.sync")), MIXED),
    "all in the new folder": (Scenario(broken(nothing, "complete_folder.sync_tree")), MIXED),
    "after the rename": (Scenario(broken(nothing, "complete_folder.sync", "folder_lock.sync")), LOST),
    "after the swap": (Scenario(broken(nothing, "complete_folder.sync"), old=write_old), MIXED),
    "around the renames": (Scenario(broken(nothing, "complete_folder.sync"), old=write_old, no_exchange=True), MIXED),
    "of what holds the folder": (Scenario(broken(nothing, "folder_lock.sync")), "leaves ['out.partial']"),
    "new parents": (Scenario(broken(make_only, "folder_lock.make_folder"), parents="a/b"), LOST),
    "before it has its name": (Scenario(write_in_place, old=write_in_place), MIXED),
}


@pytest.fixture(scope="module")
def results() -> list[Result]:
    scenarios = {name: SCENARIOS[name] for name in REAL}
    scenarios |= {name: Scenario(write, old=write_old, no_exchange=name != "write") for name in SMALL}
    scenarios |= {name: scenario for name, (scenario, _) in BROKEN.items()}
    # In /dev/shm, a state is made and removed in one millisecond; on some disks, in fifty.
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder) as place,
            PowerSweep(Path(place), scenarios, {name: WORKS[name] for name in LONG}, again=0.07) as sweep,
        ):
            real = list(islice(sweep.results(5, [*REAL, *LONG]), REAL_STATES))
            return real + list(islice(sweep.results(5, [*SMALL, *BROKEN]), SMALL_STATES))
    except RuntimeError as error:
        if not str(error).startswith("needs "):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [*REAL, *LONG, *SMALL])
def test_nothing_is_lost_or_mixed(name, results):
    """After a cut at any moment, and after the same command is run again."""
    found = [result for result in results if result.scenario == name]
    assert [str(result) for result in found if result.violations] == []
    assert {result.system for result in found} == FILE_SYSTEMS.keys()
    assert any(result.again for result in found)
    assert name in LONG or {result.found for result in found} >= {"old", "new"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_sync_left_out_is_found_out(name, results):
    """Each sync in BROKEN is needed: if it is left out, the harness finds the violation that BROKEN names."""
    told = [violation for result in results if result.scenario == name for violation in result.violations]
    assert any(BROKEN[name][1] in violation for violation in told), told
