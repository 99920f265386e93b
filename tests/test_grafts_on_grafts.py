"""Checkpoints built on checkpoints: the same bytes as in one build, the line of descent, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model_preparation import SurgeryError, build_checkpoint, extract_layers, load_checkpoint
from tests.conftest import assert_refused, make_tokenizer, run_command, seeded
from tests.test_hf_format import run_without_our_package


def build(base, layers_dir, out, *args):
    where = ("--base", base, "--llama_layers_dir", layers_dir, "--output_dir", out)
    return run_command("create_replaced_model_checkpoint", *where, *args)


def info_of(folder: Path) -> dict:
    return json.loads((folder / "checkpoint_info.json").read_text())


def tensors_of(folder: Path) -> dict:
    return json.loads((folder / "tensor_digests.json").read_text())["tensors"]


@pytest.fixture(scope="module")
def other_layers_dir(donor_dir, tmp_path_factory) -> Path:
    """The layers of another donor with the same settings."""
    folder = tmp_path_factory.mktemp("other")
    config = LlamaConfig.from_pretrained(donor_dir)
    seeded(LlamaForCausalLM(config), seed=7).save_pretrained(folder / "other-llama")
    make_tokenizer().save_pretrained(folder / "other-llama")
    extract_layers(str(folder / "other-llama"), folder / "layers")
    return folder / "layers"


@pytest.fixture(scope="module")
def second_dir(checkpoint_dir, layers_dir, tmp_path_factory) -> Path:
    """Built on `checkpoint_dir` (layers 1 and 3). Adds head 1 of layer 2; layer 1 is the base's again."""
    out = tmp_path_factory.mktemp("second") / "second"
    args = ("--heads", "2:1", "--ungraft", 1, "--format", "both")
    shown = build(checkpoint_dir, layers_dir, out, *args, "--dry_run")
    assert shown.returncode == 0, shown.stderr
    stays = "3    stays tiny-llama's"
    for words in ("a checkpoint, built on tiny-llamba", stays, "1    <- the base's own", "2    <- head 1"):
        assert words in shown.stdout
    assert not out.exists()
    result = build(checkpoint_dir, layers_dir, out, *args)
    assert result.returncode == 0, result.stderr
    return out


def test_two_steps_give_the_bytes_of_one(second_dir, base_dir, layers_dir, tmp_path):
    """Also where the first step made a folder of format hf."""
    build_checkpoint(str(base_dir), [3], layers_dir, tmp_path / "one", heads={2: [1]}, format="both")
    assert info_of(second_dir)["files"] == info_of(tmp_path / "one")["files"] | {
        "README.txt": info_of(second_dir)["files"]["README.txt"]
    }
    assert info_of(second_dir)["digests"] == info_of(tmp_path / "one")["digests"]
    build_checkpoint(str(base_dir), [3], layers_dir, tmp_path / "hf", format="hf")
    assert build(tmp_path / "hf", layers_dir, tmp_path / "three", "--layers", 0, "--format", "hf").returncode == 0
    build_checkpoint(str(base_dir), [0, 3], layers_dir, tmp_path / "direct", format="hf")
    assert info_of(tmp_path / "three")["files"] == info_of(tmp_path / "direct")["files"]
    shared = [(tmp_path / name / "layer_01.safetensors").stat().st_ino for name in ("hf", "three")]
    assert shared[0] == shared[1]


def test_it_tells_its_descent_verifies_and_is_rebuilt_without_its_parent(
    second_dir, checkpoint_dir, base_dir, layers_dir, tmp_path
):
    parent = info_of(checkpoint_dir)["files"]["tensor_digests.json"]["sha256"]
    first, second = info_of(second_dir)["descent"]
    assert first == {"from": {"id": base_dir.name}, "grafted": [1, 3], "donors": ["tiny-llama"]}
    assert second["from"] == {"id": checkpoint_dir.name, "tensor_digests_sha256": parent, "mmlu_score": None}
    assert (second["grafted"], second["grafted_heads"], second["ungrafted"]) == ([], {"2": [1]}, [1])
    assert info_of(second_dir)["base_model"] == info_of(checkpoint_dir)["base_model"]
    verified = run_command("verify_checkpoint", second_dir, "--base", base_dir, "--llama_layers_dir", layers_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    recipe = shutil.copy(second_dir / "checkpoint_info.json", tmp_path)
    again = run_command(
        *("create_replaced_model_checkpoint", "--from_info", recipe, "--output_dir", tmp_path / "again"),
        *("--llama_layers_dir", layers_dir),
    )
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout
    assert info_of(tmp_path / "again")["descent"] == [first, second]


def test_another_donor_replaces_a_layer_and_both_are_recorded(
    checkpoint_dir, base_dir, layers_dir, other_layers_dir, tmp_path
):
    out = tmp_path / "two"
    result = build(checkpoint_dir, other_layers_dir, out, "--layers", 0, 3)
    assert result.returncode == 0, result.stderr
    assert "layer_03.pt, instead of tiny-llama's" in result.stdout
    info = info_of(out)
    assert [(donor["id"], list(donor["layers"])) for donor in (info["replacement_source"], *info["other_donors"])] == [
        ("tiny-llama", ["1"]),
        ("other-llama", ["0", "3"]),
    ]
    other = AutoModelForCausalLM.from_pretrained(other_layers_dir.parent / "other-llama").model.layers[3].state_dict()
    state = torch.load(out / "model_state_dict.pt")
    assert all(torch.equal(state[f"backbone.layers.3.{name}"], other[name]) for name in other)
    for folder in (layers_dir, other_layers_dir):
        verified = run_command("verify_checkpoint", out, "--base", base_dir, "--llama_layers_dir", folder)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert "tensors belong to another donor" in verified.stdout
    rebuild = ("create_replaced_model_checkpoint", "--from_info", out, "--output_dir", tmp_path / "again")
    assert_refused(run_command(*rebuild, "--llama_layers_dir", layers_dir), "2 donors, tiny-llama, other-llama")
    again = run_command(*rebuild, "--llama_layers_dir", layers_dir, other_layers_dir)
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout


def test_two_donors_in_one_command_are_the_two_steps(base_dir, layers_dir, other_layers_dir, tmp_path):
    named = (f"A={layers_dir}", f"B={other_layers_dir}")
    layers = ("--layers", "A:1", "B:3", "--heads", "B:2:0", "B:0:1")
    build_checkpoint(str(base_dir), [1], layers_dir, tmp_path / "first")
    build_checkpoint(str(tmp_path / "first"), [3], other_layers_dir, tmp_path / "second", heads={0: [1], 2: [0]})
    where = ("--base", base_dir, "--output_dir", tmp_path / "one")
    result = run_command("create_replaced_model_checkpoint", *where, *layers, "--llama_layers_dir", *named)
    assert result.returncode == 0, result.stderr
    assert f"Donor        other-llama (layers in {other_layers_dir})" in result.stdout
    one, second = info_of(tmp_path / "one"), info_of(tmp_path / "second")
    assert (one["files"], one["digests"], one["other_donors"]) == (
        second["files"],
        second["digests"],
        second["other_donors"],
    )
    where = ("--base", base_dir, "--output_dir", tmp_path / "out")
    for given, words in (
        ((*layers, "--llama_layers_dir", named[0]), "name each donor in"),
        (("--layers", 1, "--llama_layers_dir", *named), "name each donor in"),
        (("--layers", "A:1", "--heads", "2:0", "--llama_layers_dir", *named), "name each donor in"),
        (("--layers", "A:1", "--heads", "C:2:0", "--llama_layers_dir", *named), "name each donor in"),
    ):
        assert_refused(run_command("create_replaced_model_checkpoint", *where, *given), words)
    mixed = run_command("create_replaced_model_checkpoint", *where, "--layers", "A:1", "3")
    assert_refused(mixed, "layer 3 needs its donor's name too", code=2)
    folders = {"A": layers_dir, "B": other_layers_dir}
    with pytest.raises(SurgeryError, match="Heads of layer 1 are named for two donors"):
        build_checkpoint(str(base_dir), [], folders, tmp_path / "out", heads={"A": {1: [0]}, "B": {1: [1]}})
    mixed = run_command("create_replaced_model_checkpoint", *where, "--heads", "A:1:0", "3:0")
    assert_refused(mixed, "layer 3 needs its donor's name too", code=2)


def test_where_nothing_is_left_of_the_first_donor_its_checkpoint_is_needed(
    checkpoint_dir, layers_dir, other_layers_dir, tmp_path
):
    out = tmp_path / "out"
    assert build(checkpoint_dir, other_layers_dir, out, "--layers", 1, 3).returncode == 0
    rebuild = ("create_replaced_model_checkpoint", "--from_info", out, "--output_dir", tmp_path / "again")
    where = ("--llama_layers_dir", other_layers_dir)
    assert_refused(run_command(*rebuild, *where), "Base and donors are not enough to build it")
    again = run_command(*rebuild, *where, "--base", checkpoint_dir)
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout


def other_donor(layers_dir: Path, folder: Path, **changes) -> Path:
    """The layers of a donor with these settings changed; the model is in `folder`/model."""
    config = LlamaConfig.from_dict(json.loads((layers_dir / "metadata.json").read_text())["config"] | changes)
    seeded(LlamaForCausalLM(config), seed=8).save_pretrained(folder / "model")
    extract_layers(str(folder / "model"), folder / "layers")
    return folder / "layers"


def test_each_donor_has_its_own_norms_and_positions(base_dir, donor_dir, layers_dir, quick_python, tmp_path):
    """Built in one command or two, opened in every way, and compared with layers and a head run by hand."""
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    other = other_donor(layers_dir, tmp_path, rms_norm_eps=1e-2, rope_parameters=rope)
    out = tmp_path / "one"
    named = ("--layers", "A:0,2", "B:1", "--heads", "B:3:1", "--llama_layers_dir", f"A={layers_dir}", f"B={other}")
    where = ("--base", base_dir, "--output_dir", out, "--format", "both")
    result = run_command("create_replaced_model_checkpoint", *where, *named)
    assert result.returncode == 0, result.stderr
    build_checkpoint(str(base_dir), [0, 2], layers_dir, tmp_path / "first")
    build_checkpoint(str(tmp_path / "first"), [1], other, tmp_path / "two", heads={3: [1]}, format="both")
    assert info_of(tmp_path / "two")["files"] == info_of(out)["files"]
    again = ("create_replaced_model_checkpoint", "--from_info", tmp_path / "two", "--output_dir", tmp_path / "again")
    again = run_command(*again, "--llama_layers_dir", layers_dir, other)
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout

    ids = torch.tensor([[7, 81, 200, 34, 5, 6, 99, 100, 101]])
    model = load_checkpoint(out)[0]
    donors = [AutoModelForCausalLM.from_pretrained(folder).model for folder in (donor_dir, tmp_path / "model")]
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden = model.backbone.embedding(ids)
        for index in range(3):
            donor = donors[index % 2]
            hidden = donor.layers[index](hidden, position_embeddings=donor.rotary_emb(hidden, positions))
        ours, theirs, donor = model.backbone.layers[3], donors[1].layers[3], donors[1]
        theirs.self_attn.o_proj.weight[:, :16] = 0  # of head 0
        causal = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        attended = theirs.self_attn(theirs.input_layernorm(hidden), donor.rotary_emb(hidden, positions), causal)[0]
        hidden = hidden + ours.mixer(ours.input_layernorm(hidden)) + attended
        hidden = hidden + ours.mlp(ours.post_attention_layernorm(hidden))
        wanted = model.lm_head(model.backbone.final_layernorm(hidden))[..., : model.config.vocab_size]
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
        whole = torch.load(out / "model.pt")
        assert torch.equal(whole(ids).logits, model(ids).logits)
        cached, anew = (whole.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
        assert torch.equal(cached, anew)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        f"with torch.no_grad():\n    torch.save(model(torch.tensor({ids.tolist()})).logits, 'found.pt')\n"
    )
    result = run_without_our_package(quick_python, script, out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "found.pt"), model(ids).logits)


def test_donors_that_differ_in_more_are_refused(checkpoint_dir, base_dir, layers_dir, tmp_path):
    other = other_donor(layers_dir, tmp_path, intermediate_size=44)
    out = tmp_path / "out"
    words = "other settings than the first donor: intermediate_size"
    assert_refused(build(checkpoint_dir, other, out, "--layers", 0), words)
    named = ("--layers", "A:1", "B:3", "--llama_layers_dir", f"A={layers_dir}", f"B={other}")
    result = run_command("create_replaced_model_checkpoint", "--base", base_dir, *named, "--output_dir", out)
    assert_refused(result, "The donor of layer 3", words)
    assert not out.exists()


def test_a_graft_on_a_healed_checkpoint_keeps_what_was_trained(checkpoint_dir, base_dir, layers_dir, tmp_path):
    text, healed, out = tmp_path / "text.txt", tmp_path / "healed", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    settings = ("--block_size", 16, "--batch_size", 2, "--max_steps", 1, "--method", "full", "--learning_rate", "1e-2")
    result = run_command(
        "heal_checkpoint", "--checkpoint", checkpoint_dir, "--data", text, "--output_dir", healed, *settings
    )
    assert result.returncode == 0, result.stderr
    result = build(healed, layers_dir, out, "--layers", 2, "--ungraft", 1, "--format", "both")
    assert result.returncode == 0, result.stderr
    before, after = (load_checkpoint(folder)[0].state_dict() for folder in (healed, out))
    base = torch.load(base_dir / "pytorch_model.bin")
    for name, tensor in after.items():
        if name.startswith("backbone.layers.1."):
            assert torch.equal(tensor, base[name])
        elif not name.startswith("backbone.layers.2."):
            assert torch.equal(tensor, before[name])
    origins = {name: entry["from"] for name, entry in tensors_of(out).items()}
    assert {origins[name] for name in origins if ".layers.3." in name} == {"healed"}
    assert {origins[name] for name in origins if ".layers.2." in name} == {"donor"}
    assert [step.get("healed", step.get("grafted")) for step in info_of(out)["descent"]] == [[1, 3], "full", [2]]
    assert run_command("verify_checkpoint", out, "--base", base_dir).returncode == 0
    assert "Built on healed, which is healed" in (out / "README.txt").read_text()
    rebuild = ("create_replaced_model_checkpoint", "--from_info", out, "--output_dir", tmp_path / "again")
    where = ("--llama_layers_dir", layers_dir)
    assert_refused(run_command(*rebuild, *where), "describes a graft on the checkpoint", "checkpoint is by --base")
    assert_refused(run_command(*rebuild, *where, "--base", checkpoint_dir), "is not the checkpoint healed")
    again = run_command(*rebuild, *where, "--base", healed)
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--ungraft", 0), ["Not grafted in", ": 0. Grafted are 1, 3."]),
        (("--ungraft", 1, 3), ["Nothing would be left grafted"]),
        (("--ungraft", 1, "--layers", 1), ["Layer 1 is named in --layers and in --ungraft"]),
        (("--heads", "3:0"), ["Layer 3 of", "is grafted whole", "Add --ungraft 3"]),
        (("--layers", 4), ["Layer 4 is out of range"]),
        (("--layers", 0, "--dtype", "bfloat16"), ["is in float32", "Leave --dtype bfloat16 out"]),
    ],
)
def test_what_cannot_be_grafted_on_a_checkpoint_is_refused(checkpoint_dir, layers_dir, tmp_path, args, words):
    assert_refused(build(checkpoint_dir, layers_dir, tmp_path / "out", *args), *words)
    assert not (tmp_path / "out").exists()


def test_a_parent_that_is_not_as_it_was_built_is_refused(checkpoint_dir, base_dir, layers_dir, tmp_path):
    out = tmp_path / "out"
    assert_refused(build(base_dir, layers_dir, out, "--layers", 0, "--ungraft", 1), "is no checkpoint")
    changed = Path(shutil.copytree(checkpoint_dir, tmp_path / "changed"))
    state = torch.load(changed / "model_state_dict.pt")
    state["backbone.layers.2.mixer.D"] += 1
    torch.save(state, changed / "model_state_dict.pt")
    assert_refused(
        build(changed, layers_dir, out, "--layers", 0), "is damaged: its tensor backbone.layers.2.mixer.D has changed"
    )
    parent = Path(shutil.copytree(checkpoint_dir, tmp_path / "parent"))
    info = info_of(parent)
    info["base_model"]["path"] = str(tmp_path / "gone")
    (parent / "checkpoint_info.json").write_text(json.dumps(info))
    assert_refused(build(parent, layers_dir, out, "--ungraft", 1), "/gone, but it is not here. Put it back there")
    shutil.copytree(base_dir, tmp_path / "gone")
    config = json.loads((base_dir / "config.json").read_text())
    (tmp_path / "gone" / "config.json").write_text(json.dumps(config | {"use_cache": True}))
    assert_refused(build(parent, layers_dir, out, "--ungraft", 1), "is not the base that", "config.json")
    assert not out.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda info: info.pop("dtype"),
        lambda info: info.pop("replacement_source"),
        lambda info: info["replacement_source"]["layers"].pop("3"),
        lambda info: info["files"].pop("tensor_digests.json"),
        lambda info: info["config"].update(llama_layers=[3]),
        lambda info: info["config"].update(n_layer=0),
        lambda info: info.update(digests=[]),
    ],
)
def test_a_parent_whose_description_is_damaged_is_refused(checkpoint_dir, layers_dir, tmp_path, damage):
    parent = Path(shutil.copytree(checkpoint_dir, tmp_path / "parent"))
    info = info_of(parent)
    damage(info)
    (parent / "checkpoint_info.json").write_text(json.dumps(info))
    assert_refused(
        build(parent, layers_dir, tmp_path / "out", "--layers", 0), "checkpoint_info.json", "Build the checkpoint again"
    )
