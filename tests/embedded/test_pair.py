"""The pair inside the package: what grafts do to it, as the table says, and that commands take it by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import model_preparation.embedded
from model_preparation import build_checkpoint, extract_layers, load_checkpoint
from tests.conftest import HANG_SECONDS, run_command

ROOT = Path(__file__).parents[2]
EMBEDDED = Path(model_preparation.embedded.__file__).parent
EFFECT = json.loads((EMBEDDED / "effect.json").read_text())
SINGLES, PAIRS = EFFECT["single layers"], EFFECT["pairs of layers"]
LAYERS = len(SINGLES)
BEST, POOR = max(PAIRS, key=PAIRS.__getitem__), min(PAIRS, key=PAIRS.__getitem__)


@pytest.fixture(scope="module")
def layers_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "layers"
    extract_layers("tiny_llama", folder)
    return folder


def test_the_effect_is_one():
    """The effect of grafts in effect.json is large."""
    assert EFFECT["questions"] >= 1000
    assert EFFECT["donor"] >= 0.95
    assert EFFECT["base"] <= 0.45
    assert max(SINGLES.values()) >= EFFECT["base"] + 0.25
    assert PAIRS[BEST] >= EFFECT["base"] + 0.40
    assert EFFECT["all layers"] == EFFECT["donor"]
    assert 6 <= LAYERS <= 12
    assert len(PAIRS) == LAYERS * (LAYERS - 1) // 2


def test_all_layers_grafted_are_the_donor(layers_dir, tmp_path):
    build_checkpoint("tiny_llamba", list(range(LAYERS)), layers_dir, tmp_path / "all")
    grafted, tokenizer = load_checkpoint(tmp_path / "all")
    donor = LlamaForCausalLM.from_pretrained(EMBEDDED / "tiny_llama")
    ids = tokenizer("Ada likes plums . Ben likes figs . Ada likes plums . Ben likes", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(grafted(ids).logits, donor(ids).logits)


def test_a_recipe_of_the_pair_is_built_again(layers_dir, tmp_path):
    build_checkpoint("tiny_llamba", [3], layers_dir, tmp_path / "one")
    recipe = tmp_path / "one" / "checkpoint_info.json"
    info = json.loads(recipe.read_text())
    assert info["base_model"]["hub"] == info["replacement_source"]["hub"] == "embedded"
    assert str(EMBEDDED) not in recipe.read_text()  # so it holds on any machine
    again = run_command(
        *("create_replaced_model_checkpoint", "--from_info", recipe, "--output_dir", tmp_path / "again"),
        *("--llama_layers_dir", tmp_path / "layers_again"),
    )
    assert again.returncode == 0, again.stderr
    for name in ("model.pt", "model_state_dict.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_an_unknown_embedded_model_is_refused_with_those_there_are():
    result = run_command("extract_layers", "--model_name", "embedded:huge_llama", "--output_dir", "nowhere")
    assert result.returncode == 1
    assert "has no model 'huge_llama'; it has tiny_llama, tiny_llamba" in result.stderr


def test_weights_are_small_and_cards_tell_the_scores():
    sizes = [(EMBEDDED / name / "model.safetensors").stat().st_size for name in ("tiny_llama", "tiny_llamba")]
    assert sum(sizes) <= 8_000_000
    for name in ("tiny_llama", "tiny_llamba"):
        card = (EMBEDDED / name / "README.md").read_text()
        for score in (EFFECT["base"], EFFECT["donor"], PAIRS[BEST], PAIRS[POOR]):
            assert f"| {score:.3f} |" in card
        assert AutoTokenizer.from_pretrained(EMBEDDED / name)("Ada likes").input_ids[0] == 1


def test_the_readmes_and_the_quickstart_name_the_scores_and_layers_measured():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from embedded_pair.effect import matrix, summary
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    assert matrix(EFFECT) in (ROOT / "benchmarks" / "README.md").read_text()
    assert summary(EFFECT) in (ROOT / "README.md").read_text()
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert f"best_layers=({BEST})" in quickstart
    assert f"poor_layers=({POOR})" in quickstart


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package, installed from a wheel into a folder, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "model_preparation", source / "model_preparation", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    made = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(made, check=True, timeout=HANG_SECONDS)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 12_000_000
    target = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=HANG_SECONDS
    )
    return target


def test_the_wheel_runs_the_pair_elsewhere(installed, quick_python, tmp_path):
    script = f"""
import model_preparation
from model_preparation import build_checkpoint, evaluate_checkpoint, extract_layers

assert model_preparation.__file__.startswith({str(installed)!r}), model_preparation.__file__
extract_layers("tiny_llama", "layers")
build_checkpoint("tiny_llamba", {[int(layer) for layer in BEST.split()]}, "layers", "best")
print(evaluate_checkpoint("best", tasks=["embedded_recall"], limit=50)["score"])
"""
    result = subprocess.run(
        [quick_python, "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) >= 0.9
