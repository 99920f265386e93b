"""init_llamba_base.py: the base it makes computes what it should, loads, and takes the donor's layers back."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from model_preparation import LlambaForCausalLM, SurgeryError, build_checkpoint, load_checkpoint
from model_preparation.checkpoint import llamba_init
from model_preparation.checkpoint.llamba_init import init_llamba_base
from tests.conftest import assert_refused, run_command, run_fresh_command, seeded

DECAY = 15 / 16


def save_donor(folder: Path, **changes) -> LlamaForCausalLM:
    """A Llama of 2 layers, width 32 and 4 heads of 8 in 2 groups, with `changes`, saved in `folder`."""
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-5,
    }
    model = seeded(LlamaForCausalLM(LlamaConfig(**{**fields, **changes})), seed=3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(donor_dir, tmp_path_factory) -> Path:
    """The base made from the tests' shared donor. Copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("made") / "base"
    init_llamba_base(str(donor_dir), folder)
    return folder


def linear_attention(attention, hidden_states: torch.Tensor) -> torch.Tensor:
    """The donor's attention without softmax and rotary embedding, token by token in float64.

    hidden_states: (tokens, width) -> the same shape.
    """
    config, head_dim = attention.config, attention.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    attention = attention.double()
    query = attention.q_proj(hidden_states).unflatten(-1, (-1, head_dim)) / (4 * 16 * math.sqrt(head_dim))
    key = attention.k_proj(hidden_states).unflatten(-1, (-1, head_dim))
    value = attention.v_proj(hidden_states).unflatten(-1, (-1, head_dim))
    mixed = torch.zeros(len(hidden_states), config.num_attention_heads, head_dim, dtype=torch.float64)
    for head in range(config.num_attention_heads):
        state = torch.zeros(head_dim, head_dim, dtype=torch.float64)
        for token in range(len(hidden_states)):
            state = DECAY * state + torch.outer(value[token, head // groups], key[token, head // groups])
            mixed[token, head] = state @ query[token, head]
    return attention.o_proj(mixed.flatten(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "attention_bias": True},
        {"head_dim": 16},  # all heads together are twice as wide as the model
    ],
    ids=["grouped", "ungrouped", "biases", "expand 2"],
)
@torch.no_grad()
def test_a_mixer_is_the_donors_attention_made_linear(changes, tmp_path):
    donor = save_donor(tmp_path / "donor", **changes)
    init_llamba_base(str(tmp_path / "donor"), tmp_path / "base")
    base = LlambaForCausalLM.from_pretrained(tmp_path / "base").eval()
    hidden_states = torch.randn(70, 32, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        expected = linear_attention(donor.model.layers[layer].self_attn, hidden_states.double())
        output = base.backbone.layers[layer].mixer(hidden_states.unsqueeze(0))[0]
        assert (output - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("tied", [False, True])
def test_everything_around_the_mixers_is_the_donors(tied, tmp_path):
    donor = save_donor(tmp_path / "donor", tie_word_embeddings=tied, mlp_bias=True).state_dict()
    init_llamba_base(str(tmp_path / "donor"), tmp_path / "base")
    base = LlambaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    renamed = {
        name.replace("backbone.embedding", "model.embed_tokens")
        .replace("backbone.final_layernorm", "model.norm")
        .replace("backbone.", "model."): tensor
        for name, tensor in base.items()
        if ".mixer." not in name
    }
    assert renamed.keys() == {name for name in donor if ".self_attn." not in name}
    assert all(torch.equal(tensor, donor[name]) for name, tensor in renamed.items())
    assert ("lm_head.weight" in load_file(tmp_path / "base" / "model.safetensors")) != tied


def test_the_folder_has_upstreams_config_and_the_donors_tokenizer(made, donor_dir):
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "llamba"
    assert (config["d_model"], config["n_layer"], config["vocab_size"], config["pad_vocab_size_multiple"]) == (
        32,
        4,
        260,
        1,
    )
    assert (config["norm_epsilon"], config["tie_embeddings"], config["dtype"]) == (1e-4, False, "float32")
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    assert config["mlp_cfg"] == {"intermediate_size": 40, "bias": False, "act_fn": "silu"}
    ssm = config["ssm_cfg"]
    assert (ssm["d_state"], ssm["n_v_heads"], ssm["n_qk_heads"], ssm["expand"], ssm["bias"]) == (16, 2, 2, 1, True)
    text = "Layers, 11 and 13."
    assert AutoTokenizer.from_pretrained(made)(text) == AutoTokenizer.from_pretrained(donor_dir)(text)
    given, kept = (json.loads((folder / "generation_config.json").read_text()) for folder in (donor_dir, made))
    assert kept == given


def test_it_loads_by_auto_class_and_generates(made):
    model = AutoModelForCausalLM.from_pretrained(made)
    assert isinstance(model, LlambaForCausalLM)
    prompt = AutoTokenizer.from_pretrained(made)("Hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 10)


@torch.no_grad()
def test_with_all_the_donors_layers_grafted_it_is_the_donor(made, layers_dir, donor_dir, tmp_path):
    build_checkpoint(str(made), range(4), layers_dir, tmp_path / "all")
    model, _ = load_checkpoint(tmp_path / "all")
    donor = LlamaForCausalLM.from_pretrained(donor_dir)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = donor(tokens).logits
    assert (model(tokens).logits - expected).abs().max() <= 1e-5 * expected.std()


def test_shards_and_formats_of_weights_make_no_difference(made, donor_dir, tmp_path, monkeypatch):
    weights = load_file(donor_dir / "model.safetensors")
    shutil.copytree(donor_dir, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    monkeypatch.setattr(llamba_init, "SHARD_BYTES", 60_000)
    init_llamba_base(str(tmp_path / "bin"), tmp_path / "sharded")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    whole = LlambaForCausalLM.from_pretrained(made).state_dict()
    sharded = LlambaForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_the_command_casts_and_says_what_it_made(donor_dir, tmp_path):
    result = run_command(
        "init_llamba_base", "--donor", donor_dir, "--output-dir", "base", "--dtype", "bfloat16", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    size_bytes = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert f"4 layers of width 32, 2 heads of 16, bfloat16, {size_bytes / 1000:.1f} kB\n" in result.stdout
    assert LlambaForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").dtype == torch.bfloat16
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    mode = (tmp_path / "base" / "model.safetensors").stat().st_mode
    assert mode & 0o777 == (tmp_path / "base" / "config.json").stat().st_mode & 0o777


def test_help_needs_no_torch():
    result = run_fresh_command("init_llamba_base", "--help")
    assert result.returncode == 0
    assert "--donor" in result.stdout


def test_unusable_donors_are_refused_and_leave_nothing(donor_dir, base_dir, tmp_path):
    save_donor(tmp_path / "wide", head_dim=12)
    incomplete, misshapen = (Path(shutil.copytree(donor_dir, tmp_path / name)) for name in ("incomplete", "misshapen"))
    weights = load_file(donor_dir / "model.safetensors")
    lost = weights.pop("model.layers.2.self_attn.k_proj.weight")
    save_file(weights, incomplete / "model.safetensors")
    save_file({**weights, "model.layers.2.self_attn.k_proj.weight": lost[:8]}, misshapen / "model.safetensors")
    for donor, words in [
        (tmp_path / "wide", ["4 heads of width 12 are 48 wide together", "hidden size, 32"]),
        (base_dir, ["llamba model", "a donor must be llama, mistral, qwen2 or qwen3"]),
        (incomplete, ["model.layers.2.self_attn.k_proj.weight", "lacks"]),
        (misshapen, ["model.layers.2.self_attn.k_proj.weight", "[8, 32]", "[16, 32]"]),
        (tmp_path / "nowhere", ["nowhere"]),
    ]:
        result = run_command("init_llamba_base", "--donor", donor, "--output_dir", tmp_path / "out" / "base")
        assert_refused(result, *words)
        assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept_unless_overwritten(made, donor_dir, tmp_path):
    base = Path(shutil.copytree(made, tmp_path / "base"))
    (base / "mine.txt").write_text("kept")
    command = ("init_llamba_base", "--donor", donor_dir, "--output_dir")
    assert_refused(run_command(*command, base), "exists already", "--overwrite")
    assert (base / "mine.txt").exists()
    assert run_command(*command, base, "--overwrite").returncode == 0
    assert not (base / "mine.txt").exists()


def test_the_donors_own_folder_is_never_replaced(donor_dir, tmp_path):
    donor = Path(shutil.copytree(donor_dir, tmp_path / "donor"))
    with pytest.raises(SurgeryError, match="donor's own folder"):
        init_llamba_base(str(donor), donor, overwrite=True)
    assert json.loads((donor / "config.json").read_text())["model_type"] == "llama"


def test_an_interruption_leaves_nothing(donor_dir, tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(llamba_init, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        init_llamba_base(str(donor_dir), tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
