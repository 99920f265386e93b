"""Checkpoints with grafted heads: what --heads writes, that every way of opening it gives the same, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_preparation import build_checkpoint, extract_layers, load_checkpoint, verify_checkpoint
from model_preparation.llamba.donor_kinds import KINDS
from tests.conftest import assert_refused, donor_fields, make_tokenizer, run_command, seeded
from tests.test_hf_format import run_without_our_package

IDS = [[7, 81, 200, 34, 5, 6, 99, 100, 101]]


def build(base_dir, layers_dir, out, *args):
    where = ("--base", base_dir, "--llama_layers_dir", layers_dir, "--output_dir", out)
    return run_command("create_replaced_model_checkpoint", *where, *args)


@pytest.fixture(scope="module")
def heads_dir(base_dir, layers_dir, tmp_path_factory) -> Path:
    """Layer 3 grafted, head 1 of layer 0, and both heads of layer 2, in both formats."""
    out = tmp_path_factory.mktemp("heads") / "heads"
    result = build(base_dir, layers_dir, out, "--layers", 3, "--heads", "2:1,0", "0:1", "--format", "both")
    assert result.returncode == 0, result.stderr
    assert "Layer   2    <- heads 0, 1 of" in result.stdout
    return out


@pytest.fixture(scope="module")
def other_kinds(base_dir, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint in both formats for each kind of donor except Llama, with windows if the kind has any."""
    root, found = tmp_path_factory.mktemp("kinds"), {}
    for name in KINDS.keys() - {"llama"}:
        of_kind, folder = KINDS[name].transformers_class, root / name
        window = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
        config = of_kind("Config")(**donor_fields(KINDS[name], **window))
        seeded(of_kind("ForCausalLM")(config), seed=9).save_pretrained(folder / "donor")
        make_tokenizer().save_pretrained(folder / "donor")
        extract_layers(str(folder / "donor"), folder / "layers")
        found[name] = folder / "heads"
        heads = {0: [1], 2: [0, 1]}
        build_checkpoint(str(base_dir), [3], folder / "layers", found[name], heads=heads, format="both")
    return found


def test_the_tensors_are_those_rows_and_columns_of_the_donors(heads_dir, donor_dir, base_dir):
    """The donor has two query heads of 16 and one key/value head."""
    state = torch.load(heads_dir / "model_state_dict.pt")
    donor = AutoModelForCausalLM.from_pretrained(donor_dir).model.layers
    for layer, rows in ((0, slice(16, 32)), (2, slice(0, 32))):
        theirs, prefix = donor[layer], f"backbone.layers.{layer}.attention."
        wanted = {
            "input_layernorm.weight": theirs.input_layernorm.weight,
            "q_proj.weight": theirs.self_attn.q_proj.weight[rows],
            "k_proj.weight": theirs.self_attn.k_proj.weight,
            "v_proj.weight": theirs.self_attn.v_proj.weight,
            "o_proj.weight": theirs.self_attn.o_proj.weight[:, rows],
        }
        found = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    base = torch.load(base_dir / "pytorch_model.bin")
    own = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.layers.3.")}
    assert all(torch.equal(tensor, base[name]) for name, tensor in own.items())
    origins = {
        name: entry["from"]
        for name, entry in json.loads((heads_dir / "tensor_digests.json").read_text())["tensors"].items()
    }
    assert origins["backbone.layers.0.attention.q_proj.weight"] == "donor"
    assert origins["backbone.layers.0.mixer.in_proj.weight"] == "base"


def test_every_way_of_opening_it_gives_the_same(heads_dir, other_kinds, quick_python, tmp_path):
    """model.pt, the state dict, load_checkpoint, and transformers in a process that has not this package."""
    wanted = {}
    for folder in (heads_dir, *other_kinds.values()):
        model = load_checkpoint(folder)[0]
        assert model.config.llama_heads == {"0": [1], "2": [0, 1]}
        with torch.no_grad():
            logits = model(torch.tensor(IDS)).logits
            whole = torch.load(folder / "model.pt", weights_only=True)
            assert torch.equal(whole(torch.tensor(IDS)).logits, logits)
            tokens = whole.generate(torch.tensor(IDS), max_new_tokens=8, do_sample=False)
            assert torch.equal(
                whole.generate(torch.tensor(IDS), max_new_tokens=8, do_sample=False, use_cache=False), tokens
            )
        wanted[str(folder)] = (logits, tokens)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"found, ids = {{}}, torch.tensor({IDS})\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    with torch.no_grad():\n"
        "        found[folder] = (model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False))\n"
        "torch.save(found, 'found.pt')\n"
    )
    result = run_without_our_package(quick_python, script, *wanted, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt")
    for folder, outputs in wanted.items():
        assert all(map(torch.equal, found[folder], outputs)), folder


def test_heads_of_other_kinds_have_biases_norms_and_a_recipe(other_kinds, base_dir, tmp_path):
    """Queries of head 1 are rows 16 to 32; both heads share the key/value head."""
    for kind, folder in other_kinds.items():
        state = torch.load(folder / "model_state_dict.pt")
        theirs = torch.load(folder.parent / "layers" / "layer_00.pt")
        found = {
            name.removeprefix("backbone.layers.0.attention."): tensor
            for name, tensor in state.items()
            if "layers.0.attention" in name
        }
        wanted = {"input_layernorm.weight": theirs["input_layernorm.weight"]}
        for name, tensor in theirs.items():
            if (own := name.removeprefix("self_attn.")) != name:
                rows = slice(16, 32)
                wanted[own] = tensor[rows] if "q_proj" in name else tensor[:, rows] if "o_proj" in name else tensor
        assert found.keys() == wanted.keys(), kind
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), kind
        assert verify_checkpoint(folder) == []
    where = ("--base", base_dir, "--llama_layers_dir", folder.parent / "layers")
    checked = run_command("verify_checkpoint", folder, *where)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    again = build(base_dir, folder.parent / "layers", tmp_path / "again", "--from_info", folder)
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout


def test_it_verifies_and_its_recipe_gives_the_same_bytes(heads_dir, base_dir, layers_dir, tmp_path):
    compared = ("--base", base_dir, "--llama_layers_dir", layers_dir)
    result = run_command("verify_checkpoint", heads_dir, *compared)
    assert result.returncode == 0, result.stderr + result.stdout
    again = build(base_dir, layers_dir, tmp_path / "again", "--from_info", heads_dir)
    assert again.returncode == 0, again.stderr
    assert "Every other byte is the same" in again.stdout
    info = json.loads((heads_dir / "checkpoint_info.json").read_text())
    assert info["grafted_heads"] == {"0": [1], "2": [0, 1]}
    assert info["replacement_source"]["layers"].keys() == {"0", "2", "3"}


def test_its_layers_are_extracted_with_their_heads(heads_dir, tmp_path):
    state = torch.load(heads_dir / "model_state_dict.pt")
    extract_layers(str(heads_dir), tmp_path / "layers")
    extracted = {
        f"backbone.layers.{int(path.stem.removeprefix('layer_'))}.{name}": tensor
        for path in (tmp_path / "layers").glob("layer_*.pt")
        for name, tensor in torch.load(path).items()
    }
    assert extracted.keys() == {name for name in state if name.startswith("backbone.layers.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in extracted.items())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--heads", "1:2"), 1, ["Head 2 of layer 1 is out of range: the donor has heads 0 to 1"]),
        (("--heads", "4:0"), 1, ["Layer 4 is out of range"]),
        (("--heads", "1:0", "--layers", "1"), 1, ["Layer 1 is named in --layers and in --heads"]),
        (("--heads", "1:0", "1:1"), 2, ["layer 1 is given twice"]),
        (("--heads", "A:1:0"), 1, ["name each donor in"]),
        (("--heads", "1:0,0"), 2, ["names a head more than once"]),
        (("--heads", "1"), 2, ["LAYER:HEAD"]),
        (("--heads", "1:-1"), 2, ["LAYER:HEAD"]),
        (("--layers", "1", "--keep_mixer_heads"), 2, ["--keep_mixer_heads belongs to --heads"]),
        ((), 2, ["give --layers, --heads or --ungraft"]),
    ],
)
def test_what_cannot_be_is_refused(base_dir, layers_dir, tmp_path, args, code, words):
    assert_refused(build(base_dir, layers_dir, tmp_path / "out", *args), *words, code=code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": "two"}, "is damaged (num_attention_heads is 'two'"),
        ({"num_key_value_heads": 0}, "No model can be made from this config"),
        ({"num_attention_heads": 64}, "is damaged (The hidden size (32) is not a multiple"),
    ],
)
def test_a_donor_that_is_not_as_it_says_is_refused(base_dir, layers_dir, tmp_path, config, words):
    """Two threads may fail: one refuses the heads, the other the config. The message is about the config."""
    folder = Path(shutil.copytree(layers_dir, tmp_path / "layers"))
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["config"] |= config
    (folder / "metadata.json").write_text(json.dumps(metadata))
    assert_refused(
        build(base_dir, folder, tmp_path / "out", "--heads", "1:63" if 64 in config.values() else "1:0"), words
    )


def test_the_heads_of_a_llambas_layers_are_refused(base_dir, tmp_path):
    extract_layers(str(base_dir), tmp_path / "layers")
    assert_refused(build(base_dir, tmp_path / "layers", tmp_path / "out", "--heads", "1:0"), "a donor must be llama")


def test_healing_trains_the_grafted_heads_and_leaves_the_mixers(heads_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "healed"
    settings = ("--block_size", 16, "--batch_size", 2, "--max_steps", 2, "--learning_rate", "1e-2")
    result = run_command(
        "heal_checkpoint",
        "--checkpoint",
        heads_dir,
        "--data",
        text,
        "--output_dir",
        out,
        "--method",
        "grafted",
        *settings,
    )
    assert result.returncode == 0, result.stderr
    before, after = (load_checkpoint(folder)[0].state_dict() for folder in (heads_dir, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefixes = ("backbone.layers.3.", "backbone.layers.0.attention.", "backbone.layers.2.attention.")
    assert changed
    assert all(name.startswith(prefixes) for name in changed)
    assert {name.split(".")[2] for name in changed} == {"0", "2", "3"}
    assert run_command("verify_checkpoint", out).returncode == 0
