"""scripts/quickstart.sh as a newcomer runs it, but that its environment is there: from nothing to scores and answers.

So four rows of the table come out again from the weights in the package. A near tie may fall otherwise on another
processor.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import model_preparation.embedded
from tests.conftest import HANG_SECONDS, copy_repository

SCORE = re.compile(r" [ABCD]  (\d\.\d+) ±")
ROOT = Path(__file__).parents[2]
EFFECT = json.loads((Path(model_preparation.embedded.__file__).parent / "effect.json").read_text())


def test_the_quickstart_shows_what_a_graft_does(tmp_path, put_python):
    repository = copy_repository(tmp_path / "repository")
    (repository / ".venv").mkdir()
    inputs = "".join((repository / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    (repository / ".venv" / "installed").write_text(f"{repository} \n{inputs}")
    put_python(repository / ".venv" / "bin" / "python")
    result = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pairs = EFFECT["pairs of layers"].values()
    scores = [float(score) for score in SCORE.findall(result.stdout)]
    assert scores == pytest.approx([EFFECT["base"], min(pairs), max(pairs), EFFECT["donor"]], abs=0.003)
    assert re.findall(r"^checkpoint +(.*)$", result.stdout, re.MULTILINE) == ["quinces", "cakes", "eggs"]
    best = max(EFFECT["pairs of layers"], key=EFFECT["pairs of layers"].__getitem__)
    checkpoint = repository / "model_checkpoints" / f"tiny_{best.replace(' ', '_')}"
    assert result.stdout.splitlines()[-1] == f"Checkpoint: {checkpoint}"
    assert (checkpoint / "checkpoint_info.json").is_file()
    shown = (ROOT / "README.md").read_text().partition("```text\n")[2].partition("```")[0]
    assert [float(score) for score in SCORE.findall(shown)] == pytest.approx(scores, abs=0.003)
    lines = {line.rstrip() for line in result.stdout.splitlines()}
    for line in shown.splitlines():
        assert "±" in line or line == "..." or line.startswith("Checkpoint: ") or line in lines
