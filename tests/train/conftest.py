"""Fixtures of the healing tests: a text, the flags of a short run, and the checkpoint of that run."""

import gc
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import pytest

from model_preparation.train.heal import heal as _imported_before_forks  # noqa: F401
from tests.train.cutting import run_heal, write_text

# Flags of a short run with shuffling, dropout and accumulation.
RUN = {"max_steps": 6, "batch_size": 2, "block_size": 16, "accumulation": 2, "dropout": 0.1}
RUN |= {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "eval_interval": 3, "device": "cpu"}

# accelerate collects garbage when it starts. In a fork, this writes into all objects, so the fork copies their memory.
# `freeze` keeps the objects that exist now out of collections.
gc.freeze()

Heal = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", words=600)


@pytest.fixture(scope="session")
def flags(checkpoint_dir, text_file) -> list[object]:
    """The flags of RUN, on the tiny checkpoint. A flag that is added later wins."""
    given = {"checkpoint": checkpoint_dir, "data": text_file, **RUN}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="session")
def heal(flags) -> Heal:
    """Run the command; further arguments are its flags."""
    return lambda output_dir, *more: run_heal(*flags, "--output_dir", output_dir, *more)


@pytest.fixture(scope="session")
def healed(heal, tmp_path_factory) -> Path:
    """The checkpoint of a run that nobody kills. Copy it and its states before changing anything."""
    folder = tmp_path_factory.mktemp("healed") / "tiny_1_3_v2_healed"
    result = heal(folder)
    assert result.returncode == 0, result.stderr
    (folder.parent / "stdout").write_text(result.stdout)
    return folder
