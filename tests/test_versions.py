"""A checkpoint outlives the versions it was written with: written under the oldest or the newest, opened under either.

scripts/test_versions.sh runs this with the oldest libraries. In OTHER_PYTHON, it names the Python of the newest ones.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import run_python

OTHER_PYTHON = os.environ.get("OTHER_PYTHON")

WRITE = """
import sys
import model_preparation
base, layers_dir, target = sys.argv[1:]
model_preparation.build_checkpoint(base, [1, 3], layers_dir, target, format="both")
"""

# The folder's own code first: once the package is imported, transformers takes its classes instead.
OPEN = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
transformers.utils.logging.disable_progress_bar()
models = {}
for folder in sys.argv[1:]:
    models[f"{folder} hf"] = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import model_preparation
for folder in sys.argv[1:]:
    models[f"{folder} safe"] = torch.load(f"{folder}/model.pt")
    models[f"{folder} unpickled"] = torch.load(f"{folder}/model.pt", weights_only=False)
    models[f"{folder} load_checkpoint"] = model_preparation.load_checkpoint(folder)[0]
ids = torch.tensor([[5, 17, 99, 3, 42, 8], [1, 9, 70, 4, 2, 30]])
ways = {"recomputed": {"use_cache": False}, "greedy": {}, "beams": {"num_beams": 3}}
found = {
    name: {
        way: model.generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False, **options).tolist()
        for way, options in ways.items()
    }
    for name, model in models.items()
}
print(json.dumps({"transformers": transformers.__version__, "tokens": found}))
"""
NO_DEPRECATION = ("-W", "error::DeprecationWarning", "-W", "error::FutureWarning")


@pytest.mark.skipif(OTHER_PYTHON is None, reason="scripts/test_versions.sh makes the other environment")
def test_every_way_of_loading_gives_the_same_tokens_under_the_oldest_and_the_newest(base_dir, layers_dir, tmp_path):
    def run(python: str, *args: str) -> str:
        places = {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_MODULES_CACHE": str(tmp_path / "code")}
        result = run_python(*args, cwd=tmp_path, python=python, **places)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        return result.stdout

    pythons = {"this": sys.executable, "other": OTHER_PYTHON}
    for name, python in pythons.items():
        run(python, "-c", WRITE, str(base_dir), str(layers_dir), name)
    opened = [json.loads(run(python, *NO_DEPRECATION, "-c", OPEN, *pythons)) for python in pythons.values()]
    assert opened[0]["transformers"] != opened[1]["transformers"]
    for found in opened:
        assert found["tokens"].keys() == opened[0]["tokens"].keys()
        [recomputed] = {json.dumps(tokens["recomputed"]) for tokens in found["tokens"].values()}
        assert {json.dumps(tokens["greedy"]) for tokens in found["tokens"].values()} == {recomputed}
        assert found["tokens"] == opened[0]["tokens"]
