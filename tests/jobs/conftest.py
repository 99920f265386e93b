"""What the tests of batches share: checkpoints of a checkpoint_info.json only, and the stand-in that scores them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
