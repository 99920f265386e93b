"""Agreement with upstream's own implementation, on reference files that are not part of the repository.

Set LLAMBA_REFERENCE to a folder with `base/`, `hybrid/` and `state_dict_shapes.json`. `base/` and `hybrid/` each have
config.json, pytorch_model.bin, inputs.pt, logits.pt, greedy.pt and meta.json. `hybrid/` also has two Llamas, `donor/`
and `donor_v4config/`.
Without LLAMBA_REFERENCE these tests are skipped.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_preparation import build_checkpoint, extract_layers, load_checkpoint
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

REFERENCE = Path(os.environ.get("LLAMBA_REFERENCE", ""))

pytestmark = pytest.mark.skipif("LLAMBA_REFERENCE" not in os.environ, reason="LLAMBA_REFERENCE is not set")


def assert_agrees(model: LlambaForCausalLM, folder: Path) -> None:
    inputs, logits, greedy = (torch.load(folder / f"{name}.pt") for name in ("inputs", "logits", "greedy"))
    with torch.no_grad():
        for length in json.loads((folder / "meta.json").read_text())["seq_lens"]:
            wanted = logits[f"logits_{length}"]
            assert ((model(inputs[f"ids_{length}"]).logits - wanted).abs().max() / wanted.std()).item() <= 1e-4
    prompt = inputs["prompt"]
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert torch.equal(tokens, greedy["sequences"])


def test_base():
    assert_agrees(AutoModelForCausalLM.from_pretrained(REFERENCE / "base").eval(), REFERENCE / "base")


@pytest.mark.parametrize("donor", ["donor", "donor_v4config"])
def test_hybrid_through_the_whole_pipeline(donor, tmp_path):
    hybrid = REFERENCE / "hybrid"
    layers = json.loads((hybrid / "meta.json").read_text())["replaced_layers"]
    extract_layers(str(hybrid / donor), tmp_path / "layers")
    build_checkpoint(str(hybrid), layers, tmp_path / "layers", tmp_path / "out")
    for implementation in ("eager", "sdpa"):
        model, _ = load_checkpoint(tmp_path / "out")
        model.set_attn_implementation(implementation)
        assert_agrees(model, hybrid)


def test_names_and_shapes_of_the_published_models():
    published = json.loads((REFERENCE / "state_dict_shapes.json").read_text())
    for name, shapes in published.items():
        width = shapes["backbone.final_layernorm.weight"][0]
        config = LlambaConfig(
            d_model=width,
            n_layer=1 + max(int(key.split(".")[2]) for key in shapes if "layers" in key),
            tie_embeddings="lm_head.weight" not in shapes,
            mlp_cfg={"intermediate_size": shapes["backbone.layers.0.mlp.gate_proj.weight"][0]},
        )
        found = {key: list(parameter.shape) for key, parameter in empty_model(config).named_parameters()}
        assert found == shapes, name
