"""The donor's training in scripts/make_embedded_pair.py: stopped and continued, it gives the same weights."""

import importlib
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from model_preparation import SurgeryError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def donor():
    """The module that trains the donor. Here a donor has two layers. Every second step is saved."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        module = importlib.import_module("embedded_pair.donor")
    finally:
        sys.path.remove(str(SCRIPTS))
    module.SAVED_EVERY = 2
    shape, module.made = module.config(), module.config
    shape.num_hidden_layers = 2
    module.config = lambda heads: shape
    return module


class Stopped(Progress):
    """A display that ends the run when it is told of the third step."""

    def update(self, *args, **kwargs):
        super().update(*args, **kwargs)
        if self.tasks[0].completed == 3:
            raise KeyboardInterrupt


def test_a_training_that_was_stopped_ends_with_the_same_weights(donor, tmp_path):
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    donor.train_donor(
        tmp_path / "straight" / "model", tmp_path / "straight" / "state.pt", seed=3, progress=Progress(), steps=5
    )
    folder, state = tmp_path / "stopped" / "model", tmp_path / "stopped" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        donor.train_donor(folder, state, seed=3, progress=Stopped(), steps=5)
    assert not folder.exists()
    with pytest.raises(SurgeryError, match="seed': 3"):
        donor.train_donor(folder, state, seed=4, progress=Progress(), steps=5)
    display = Progress()
    donor.train_donor(folder, state, seed=3, progress=display, steps=5)
    straight = (tmp_path / "straight" / "model" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == straight
    assert display.tasks[0].completed == 5


def test_the_heads_of_the_donor_and_the_place_of_another_pair(donor, monkeypatch, capsys):
    """A pair of other sizes or steps does not replace the pair in the package."""
    assert donor.made(8).num_attention_heads == donor.made(8).num_key_value_heads == 8
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("make_embedded_pair")
    for options in (["--heads", "8"], ["--steps", "5"], ["--mixer_heads", "4"], ["--d_state", "4"]):
        monkeypatch.setattr(sys, "argv", ["make_embedded_pair.py", *options])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 2
        assert "needs another --output_dir" in capsys.readouterr().err
