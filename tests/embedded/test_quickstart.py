"""scripts/quickstart.sh as a newcomer runs it: from nothing but a .venv to scores and answers.

So four rows of README's table are computed again from the weights in the package, on the first questions.
Where two answers are nearly equal, another processor may choose the other answer.
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
# The first 200 of the 1,000 questions, because all of them would take long. The scores are for these 200.
QUESTIONS, SCORES = 200, (0.285, 0.25, 0.88, 1.0)
EFFECT = json.loads((Path(model_preparation.embedded.__file__).parent / "effect.json").read_text())


def test_the_quickstart_shows_what_a_graft_does(tmp_path, put_python):
    repository = copy_repository(tmp_path / "repository")
    (repository / ".venv").mkdir()
    inputs = "".join((repository / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    (repository / ".venv" / "installed").write_text(f"{repository} \n{inputs}")
    put_python(repository / ".venv" / "bin" / "python")
    questions = repository / "model_preparation" / "embedded" / "embedded_recall" / "questions.jsonl"
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:QUESTIONS]))
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
    assert scores == pytest.approx(SCORES, abs=0.011)
    assert re.findall(r"^checkpoint +(.*)$", result.stdout, re.MULTILINE) == ["quinces", "cakes", "eggs"]
    best = max(EFFECT["pairs of layers"], key=EFFECT["pairs of layers"].__getitem__)
    checkpoint = repository / "model_checkpoints" / f"tiny_{best.replace(' ', '_')}"
    assert result.stdout.splitlines()[-1] == f"Checkpoint: {checkpoint}"
    assert (checkpoint / "checkpoint_info.json").is_file()
    shown = (ROOT / "README.md").read_text().partition("```text\n")[2].partition("```")[0]
    of_all = [EFFECT["base"], min(pairs), max(pairs), EFFECT["donor"]]
    assert of_all == pytest.approx(SCORES, abs=0.1)
    assert [float(score) for score in SCORE.findall(shown)] == of_all
    lines = {line.rstrip() for line in result.stdout.splitlines()}
    for line in shown.splitlines():
        assert "±" in line or line == "..." or line.startswith("Checkpoint: ") or line in lines
