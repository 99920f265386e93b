"""LoRA: trained, saved alone, loaded onto other checkpoints, merged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_preparation import build_checkpoint, load_checkpoint, verify_checkpoint
from model_preparation.checkpoint.model_digests import recorded_weights
from model_preparation.errors import SurgeryError
from model_preparation.train.heal.adapters import load_adapter, merge
from model_preparation.train.heal.heal import merge_adapter
from tests.conftest import assert_refused, run_command
from tests.train.cutting import outcome, run_until
from tests.train.test_heal import with_score

IDS = torch.arange(40).reshape(2, 20)
LORA = ("--method", "lora", "--lora_rank", 4, "--lora_dropout", 0.1)


@pytest.fixture(scope="module")
def lora(heal, tmp_path_factory):
    """A checkpoint healed by LoRA; its adapter is in adapter/."""
    folder = tmp_path_factory.mktemp("lora") / "healed"
    result = heal(folder, *LORA)
    assert result.returncode == 0, result.stderr
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_merged_weights_give_the_adapters_logits(lora, checkpoint_dir):
    assert verify_checkpoint(lora) == []
    adapted = load_adapter(load_checkpoint(checkpoint_dir)[0], lora / "adapter")
    merged = load_checkpoint(lora)[0]
    # In float32 the adapter's own logits are 1.2e-5 off those in float64. So the tolerance is relative.
    wanted = logits(adapted)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(logits(merged.double()), logits(adapted.double()), rtol=0, atol=1e-5)
    merged.float()
    assert (logits(merged) - logits(load_checkpoint(checkpoint_dir)[0])).abs().max() > 1e-3


def test_only_the_adapter_is_in_it_and_in_the_states(lora, checkpoint_dir):
    names = load_file(lora / "adapter" / "adapter_model.safetensors")
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert str(checkpoint_dir) not in (lora / "adapter" / "adapter_config.json").read_text()
    states = lora.with_name("healed_resume")
    assert not list(states.glob("*/model.safetensors"))
    assert len(list(states.glob("*/adapter_model.safetensors"))) == 3


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_names_of_wrapped_models_load_too(lora, checkpoint_dir, prefix, tmp_path):
    shutil.copytree(lora / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, path.with_suffix(".bin"))
    wanted = logits(load_adapter(load_checkpoint(checkpoint_dir)[0], lora / "adapter"))
    assert torch.equal(logits(load_adapter(load_checkpoint(checkpoint_dir)[0], tmp_path / "adapter")), wanted)


def test_an_adapter_that_does_not_fit_is_refused_with_what_is_odd(lora, checkpoint_dir, tmp_path):
    shutil.copytree(lora / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors["odd"] = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(SurgeryError, match=f"missing 1: {name}; unexpected 1: odd"):
        load_adapter(load_checkpoint(checkpoint_dir)[0], tmp_path / "adapter")


def test_merging_into_another_checkpoint_adds_scaled_b_times_a(lora, base_dir, layers_dir, tmp_path):
    build_checkpoint(str(base_dir), [1, 3], layers_dir, tmp_path / "other", dtype=torch.float32)
    weights = torch.load(tmp_path / "other" / "model_state_dict.pt")
    result = run_command(
        "heal_checkpoint",
        *("--checkpoint", tmp_path / "other", "--merge_adapter", lora / "adapter", "--output_dir", tmp_path / "merged"),
        *("--format", "both"),
    )
    assert result.stdout.splitlines()[-1] == f"Merged checkpoint: {tmp_path / 'merged'}"
    assert verify_checkpoint(tmp_path / "merged") == []
    tensors = load_file(lora / "adapter" / "adapter_model.safetensors")
    scale = json.loads((lora / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 4
    place = "backbone.layers.0.mixer.in_proj"
    change = (
        scale * tensors[f"base_model.model.{place}.lora_B.weight"] @ tensors[f"base_model.model.{place}.lora_A.weight"]
    )
    merged = torch.load(tmp_path / "merged" / "model_state_dict.pt")
    torch.testing.assert_close(merged[f"{place}.weight"], weights[f"{place}.weight"] + change)
    assert torch.equal(merged["lm_head.weight"], weights["lm_head.weight"])
    assert json.loads((tmp_path / "merged" / "checkpoint_info.json").read_text())["parent"]["id"] == "other"


@pytest.mark.parametrize("of_these", [True, False])
def test_merging_takes_the_score_before_only_if_it_is_of_these_weights(lora, checkpoint_dir, tmp_path, of_these):
    weights = recorded_weights(checkpoint_dir) if of_these else "0" * 64
    scored = with_score(checkpoint_dir, tmp_path / "scored", weights=weights)
    merge_adapter(scored, lora / "adapter", tmp_path / "merged")
    info = json.loads((tmp_path / "merged" / "checkpoint_info.json").read_text())
    before = json.loads((scored / "checkpoint_info.json").read_text())["mmlu_score"]
    assert info["healing"]["scores"]["before"]["mmlu_score"] == (before if of_these else None)


def test_training_goes_on_from_an_adapter(heal, lora, checkpoint_dir, tmp_path):
    adapter = shutil.copytree(lora / "adapter", tmp_path / "adapter")
    scored = with_score(checkpoint_dir, tmp_path / "scored", weights=recorded_weights(checkpoint_dir))
    begun = ("--checkpoint", scored, *LORA, "--init_from", adapter)
    result = heal(tmp_path / "out", *begun, "--max_steps", 1)
    assert result.returncode == 0, result.stderr
    scores = [
        json.loads((folder / "checkpoint_info.json").read_text())["healing"]["scores"]
        for folder in (lora, tmp_path / "out")
    ]
    assert scores[1]["before"]["eval_loss"] == pytest.approx(scores[0]["after"]["eval_loss"], abs=1e-5)
    assert scores[1]["before"]["mmlu_score"] is None  # the parent's score is not that of parent and adapter
    path = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    stale = heal(tmp_path / "out", *begun, "--max_steps", 2, "--overwrite")
    assert_refused(stale, "init_from: the content has changed", "start again with another --output_dir")
    refused = heal(tmp_path / "full", "--init_from", lora / "adapter")
    assert_refused(refused, "is an adapter", "--merge_adapter")


def test_a_killed_run_with_an_adapter_and_its_dropout_ends_with_the_same_bits(flags, heal, lora, tmp_path):
    run_until([*flags, *LORA, "--output_dir", tmp_path / "out"], 3, 0.01)
    result = heal(tmp_path / "out", *LORA)
    assert result.returncode == 0, result.stderr
    assert outcome(tmp_path / "out") == outcome(lora)


def test_merging_leaves_no_trace_of_the_adapter(lora, checkpoint_dir):
    merged = merge(load_adapter(load_checkpoint(checkpoint_dir)[0], lora / "adapter"))
    assert merged.state_dict().keys() == load_checkpoint(checkpoint_dir)[0].state_dict().keys()
