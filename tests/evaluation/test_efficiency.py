"""test_checkpoint.py --efficiency: what it counts, where it keeps it, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from model_preparation import measure_efficiency
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation import efficiency
from tests.conftest import assert_refused, run_command

# How many numbers the tiny models' caches hold: K and V per token and layer, and a mixer's inputs and state.
KV, INPUTS, STATE = 2 * 1 * 16, 4 * (32 + 2 * 2 * 8), 32 * 8


def cache_of(grafted, tokens, item_bytes=4):
    return grafted * tokens * KV * item_bytes + (4 - grafted) * (INPUTS * item_bytes + STATE * 4)


def test_checkpoint_base_and_donor_are_measured_side_by_side(checkpoint_dir, quick_children, tmp_path):
    flags = ("--efficiency", "--skip_generation", "--contexts", 24, 40, "--results_dir", tmp_path / "results")
    result = run_command("test_checkpoint", "--checkpoint", checkpoint_dir, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results" / checkpoint_dir.name / "efficiency"
    assert result.stdout.splitlines()[-1] == f"Efficiency is in {folder}"
    assert re.search(r"^Measured     on .+, 1 thread, float32, one sequence; medians$", result.stdout, re.MULTILINE)
    assert len(re.findall(r"^(?:checkpoint|base|donor) +(?:24|40) ( +[\d.]+){4}$", result.stdout, re.MULTILINE)) == 6
    found = json.loads((folder / "efficiency.json").read_text())
    assert str(tmp_path) not in json.dumps(found)  # results may be shared
    rows = {model["name"]: model["contexts"] for model in found["models"]}
    held = {name: [(row["context"], row["cache_bytes"]) for row in rows[name]] for name in rows}
    grafted = {"checkpoint": 2, "base": 0, "donor": 4}
    assert held == {name: [(24, cache_of(count, 24)), (40, cache_of(count, 40))] for name, count in grafted.items()}
    for row in (row for each in rows.values() for row in each):
        assert row["token_seconds"] > 0
        assert row["first_token_seconds"] > 0
        assert row["peak_memory_bytes"] > 10_000_000  # Python alone has more
    assert len(Image.open(folder / "efficiency.png").convert("RGB").getcolors(1 << 20)) > 10


def test_bytes_that_the_config_does_not_explain_are_an_error(checkpoint_dir, monkeypatch):
    model, _ = load_checkpoint(checkpoint_dir, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert efficiency._measure(model, 20, "it")["cache_bytes"] == cache_of(2, 20, item_bytes=2)
        monkeypatch.setitem(model.config.ssm_cfg, "d_state", 16)
        with pytest.raises(SurgeryError, match=r"cache of it holds [\d,]+ bytes after 20 tokens, but its config"):
            efficiency._measure(model, 20, "it")


def test_a_model_that_does_not_load_is_named_and_an_earlier_result_stays(donor_dir, quick_children, tmp_path):
    donor = shutil.copytree(donor_dir, tmp_path / "donor")
    results = tmp_path / "results" / "donor" / "efficiency"
    results.mkdir(parents=True)
    (results / "efficiency.json").write_text("earlier")
    weights = donor / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SurgeryError, match=rf"donor \({donor}\) could not be measured: .*{donor}"):
        measure_efficiency(donor, results_dir=tmp_path / "results")
    assert (results / "efficiency.json").read_text() == "earlier"
    assert [path.name for path in results.parent.iterdir()] == ["efficiency"]


def test_what_cannot_be_measured_is_refused_first(checkpoint_dir, donor_dir, tmp_path):
    run = ("test_checkpoint", "--checkpoint", checkpoint_dir)
    skip = ("--efficiency", "--skip_generation")
    assert_refused(run_command(*run, *skip, "--contexts", 500), "500 tokens", "512 positions", "up to 496")
    assert_refused(run_command(*run, "--contexts", 50), "belongs to --efficiency", code=2)
    assert_refused(run_command(*run, *skip, "--parallelize"), "leave out --parallelize", code=2)
    assert_refused(run_command(*run, *skip, "--compare_with", "nowhere"), "nowhere")
    assert_refused(run_command(*run[:2], donor_dir, *skip), "--results_dir")
    damaged = shutil.copytree(donor_dir, tmp_path / "damaged")
    for text in ("{", '{"model_type": "llama", "max_position_embeddings": "512"}'):
        (damaged / "config.json").write_text(text)
        assert_refused(run_command(*run, *skip, "--compare_with", damaged), str(damaged / "config.json"))
