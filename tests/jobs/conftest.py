"""What the tests of batches share: checkpoints without weights, and the stand-in that scores them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PACKAGE
from tests.jobs.quick_workers import environment

FAKE_EVALUATOR = Path(__file__).with_name("fake_evaluator.py")


@pytest.fixture
def make_candidate(checkpoint_dir, tmp_path) -> Callable[..., Path]:
    """Makes tmp_path/checkpoints/NAME, which says of itself that `layers` are replaced."""

    def make(name: str, layers: tuple[int, ...] = (1, 3), behaviour: str = "run") -> Path:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        info = json.loads((checkpoint_dir / "checkpoint_info.json").read_text())
        (folder / "checkpoint_info.json").write_text(json.dumps({**info, "replaced_layers": list(layers)}))
        (folder / "behaviour").write_text(behaviour)
        return folder

    return make


@pytest.fixture
def quick_workers(quick_python, monkeypatch):
    """The workers of commands that use Ray, and what they start, need not import torch again."""
    monkeypatch.setattr(sys, "executable", str(quick_python))
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", f"{environment.__module__}.{environment.__name__}")
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))  # where the hook is
