"""Donors of every kind through the commands: base, layers, checkpoint in every format; search, healing, scores."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model_preparation import (
    build_checkpoint,
    distill_llamba_base,
    evaluate_checkpoint,
    extract_layers,
    verify_checkpoint,
)
from model_preparation.checkpoint.grafted_model import empty_model
from model_preparation.checkpoint.llamba_init import CORRELATED, init_llamba_base, llamba_config
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import resolve
from model_preparation.llamba import LlambaConfig
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.search.search import search_layers
from model_preparation.search.settings import SearchSettings
from model_preparation.serve.choose_engine import choose_engine
from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.settings import DistillSettings
from model_preparation.train.distill.train_layer import Teacher
from tests.conftest import (
    PACKAGE,
    assert_refused,
    donor_fields,
    make_tokenizer,
    old_spelling,
    run_command,
    run_python,
    seeded,
    tiny_config,
    tiny_llama_cfg,
)
from tests.search.conftest import make_questions, write_task
from tests.test_hf_format import run_without_our_package
from tests.train.cutting import write_text

IDS = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(3))
WINDOW = 6

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 259}
# All kinds in one process; `found.pt` has what each model gave.
PROBE = """
import sys, pathlib, torch
root, packaged, found = sys.argv[1], sys.argv[2] == "with the package", {}
if packaged:
    import model_preparation
from transformers import AutoModelForCausalLM
ids = torch.load(f"{root}/ids.pt")
for folder in pathlib.Path(root).glob("*"):
    if not folder.is_dir():
        continue
    if packaged:
        models = torch.load(folder / "pt" / "model.pt"), model_preparation.load_checkpoint(folder / "pt")[0]
    else:
        models = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True),
    with torch.no_grad():
        found[folder.name] = [(model(ids).logits, model.generate(ids, **GREEDY)) for model in models]
assert packaged or not [name for name in sys.modules if name.partition(".")[0] == "model_preparation"]
torch.save(found, "found.pt")
"""


def make_donor_of(kind, folder: Path) -> Path:
    """A donor with everything that its kind can have, and its config.json in the older spelling."""
    changes = {"head_dim": 32, "tie_word_embeddings": True}
    changes["rope_parameters"] = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    changes |= {name: True for name in ("attention_bias", "mlp_bias") if name in kind.fields}
    if "sliding_window" in kind.fields:
        changes |= {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2}
    config = kind.transformers_class("Config")(**donor_fields(kind, **changes))
    seeded(kind.transformers_class("ForCausalLM")(config), seed=7).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(old_spelling(json.loads(path.read_text()))))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """For each kind, a folder with donor, base, layers. Checkpoints `pt` and `hf` have all layers grafted."""
    root = tmp_path_factory.mktemp("kinds")
    for kind in KINDS.values():
        folder = root / kind.model_type
        donor = str(make_donor_of(kind, folder / "donor"))
        init_llamba_base(donor, folder / "base")
        extract_layers(donor, folder / "layers")
        for form in ("pt", "hf"):
            build_checkpoint(str(folder / "base"), [0, 1, 2, 3], folder / "layers", folder / form, format=form)
    torch.save(IDS, root / "ids.pt")
    return root


@pytest.fixture(scope="module")
@torch.no_grad()
def of_donors(made) -> dict:
    """Logits and greedy tokens by kind."""
    donors = {name: AutoModelForCausalLM.from_pretrained(made / name / "donor") for name in KINDS}
    return {name: (donor(IDS).logits, donor.generate(IDS, **GREEDY)) for name, donor in donors.items()}


@pytest.mark.parametrize("how", ["with the package", "without it"])
def test_all_layers_grafted_are_the_donor_in_another_process(made, of_donors, how, quick_python, tmp_path):
    script = PROBE.replace("GREEDY", str(GREEDY))
    if how == "without it":
        result = run_without_our_package(quick_python, script, made, how, cwd=tmp_path)
    else:
        places = {"cwd": tmp_path, "python": quick_python, "PYTHONPATH": str(PACKAGE.parent)}
        result = run_python("-c", script, str(made), how, **places)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == KINDS.keys()
    for name, outputs in found.items():
        for given in outputs:
            assert all(map(torch.equal, given, of_donors[name])), name


def test_the_checkpoint_says_its_donor_and_is_whole(made):
    for name in KINDS:
        info = json.loads((made / name / "pt" / "checkpoint_info.json").read_text())
        assert info["config"].get("donor_type", "llama") == name
        assert verify_checkpoint(made / name / "pt") == verify_checkpoint(made / name / "hf") == []
        kept = json.loads((made / name / "layers" / "metadata.json").read_text())["config"]
        assert kept["model_type"] == name


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_teacher_gives_what_the_donors_layers_give(made, name):
    """Also for inputs longer than the window: a layer needs a mask, and the teacher makes this mask."""
    whole = AutoModelForCausalLM.from_pretrained(made / name / "donor")
    entering = whole(IDS, output_hidden_states=True).hidden_states
    config = read_config(made / name / "donor")
    donor = Donor.open(resolve(str(made / name / "donor")), "cpu")
    for index in range(config.num_hidden_layers - 1):  # the last hidden state is normed already
        torch.testing.assert_close(Teacher(donor.layer(index)).output(entering[index]), entering[index + 1])


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_base_distilled_from_it_is_closer_to_it(made, name, tmp_path):
    tokens = torch.randint(0, 256, (18, 16), generator=torch.Generator().manual_seed(0))
    settings = DistillSettings(steps_per_layer=20, batch_size=4, learning_rate=3e-3, seed=5)
    summary = distill_llamba_base(str(made / name / "donor"), tmp_path / "base", tokens, settings)
    errors = [(row["initial"], row["final"]) for row in summary["layers"]]
    assert sum(final for _, final in errors) < sum(initial for initial, _ in errors)


@torch.no_grad()
def test_norms_of_queries_and_keys_become_factors_of_the_expected_size(made):
    """For independent input channels, the mixer's keys are `CORRELATED` times smaller than the donor's."""
    donor = AutoModelForCausalLM.from_pretrained(made / "qwen3" / "donor")
    base = load_file(made / "qwen3" / "base" / "model.safetensors")
    layer, head_dim, width = donor.model.layers[1], 32, 64
    states = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    normed = layer.input_layernorm(states)
    keys = layer.self_attn.k_norm(layer.self_attn.k_proj(normed).unflatten(-1, (-1, head_dim)))
    rows = slice(width, 2 * width)  # of the mixer's projection: x, then B from the keys
    weight = base["backbone.layers.1.mixer.in_proj.weight"][rows]
    found = normed @ weight.T + base["backbone.layers.1.mixer.in_proj.bias"][rows]
    sizes = [values.square().mean().sqrt().item() for values in (found * CORRELATED, keys)]
    assert math.isclose(*sizes, rel_tol=0.05)


def test_search_healing_and_scores_of_a_qwen3_graft(made, tmp_path, monkeypatch):
    """A graft of all layers computes what the donor does: its divergence is 0, with and without windows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
    # The questions begin alike, with more tokens than the window has.
    task = str(write_task(tmp_path / "task", "tiny_words", make_questions(6)))
    for name in ("qwen3", "mistral"):
        parts = made / name
        settings = SearchSettings(
            tmp_path / f"search_{name}",
            base=str(parts / "base"),
            donor=str(parts / "donor"),
            llama_layers_dir=parts / "layers",
            tasks=(task,),
            batch_size=3,
            method="exhaustive",
            min_layers=3,
            max_layers=4,
            objective="kl",
        )
        best = search_layers(settings)["final_results"][0]
        assert best["layers"] == [0, 1, 2, 3]
        assert best["fitness"] == pytest.approx(0, abs=1e-5), best
    heads = [f"{layer}:{head}" for layer in range(4) for head in range(2)]
    (tmp_path / "heads.txt").write_text("\n".join(heads))

    def of_heads(name: str) -> SearchSettings:
        parts = made / name
        places = {"base": str(parts / "base"), "donor": str(parts / "donor"), "llama_layers_dir": parts / "layers"}
        sizes = {"unit": "heads", "method": "greedy", "min_layers": 1, "max_layers": None, "max_heads": 8}
        more = {"prior": tmp_path / "heads.txt", "budget_evaluations": 20, "output_dir": tmp_path / f"heads_{name}"}
        return replace(settings, **places, **sizes, **more)

    best = search_layers(of_heads("qwen2"))["final_results"][0]
    assert best["heads"] == heads
    assert best["fitness"] == pytest.approx(0, abs=1e-5), best
    # This donor has an attention_bias.
    with pytest.raises(SurgeryError, match=r"attention_bias.*belongs to no head.*--layers"):
        search_layers(of_heads("qwen3"))

    text = write_text(tmp_path / "text.txt", words=200)
    flags = {"max_steps": 2, "batch_size": 2, "block_size": 16, "method": "lora", "device": "cpu"}
    result = run_command(
        "heal_checkpoint",
        *("--checkpoint", made / "qwen3" / "pt", "--data", text, "--output_dir", tmp_path / "healed"),
        *(part for flag, value in flags.items() for part in (f"--{flag}", value)),
    )
    assert result.returncode == 0, result.stderr
    adapter = load_file(tmp_path / "healed" / "adapter" / "adapter_model.safetensors")
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert [tensor for tensor in adapter if f"layers.1.self_attn.{projection}.lora_A" in tensor], projection
    scored = evaluate_checkpoint(tmp_path / "healed", tasks=(task,), device="cpu")
    assert 0 <= scored["score"] <= 1


@pytest.mark.parametrize(
    ("model_type", "name", "flags"),
    [
        ("gemma2", "extract_layers", ("--model_name",)),
        ("phi3", "init_llamba_base", ("--donor",)),
        ("mixtral", "distill_llamba_base", ("--data", "self", "--device", "cpu", "--donor")),
        ("qwen3_moe", "search_layers", ("--base", "BASE", "--task", "embedded_recall", "--device", "cpu", "--donor")),
    ],
)
def test_other_kinds_are_refused_in_one_sentence(model_type, name, flags, base_dir, tmp_path):
    donor = tmp_path / "donor"
    donor.mkdir()
    (donor / "config.json").write_text(json.dumps({"model_type": model_type, "num_hidden_layers": 4}))
    (donor / "model.safetensors").touch()
    words = f"is a {model_type} model, and a donor must be llama, mistral, qwen2 or qwen3."
    flags = [base_dir if flag == "BASE" else flag for flag in flags]
    result = run_command(name, *flags, donor, "--output_dir", tmp_path / "out")
    assert_refused(result, words)
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_vllm_is_chosen_only_for_models_that_it_can_serve(monkeypatch):
    monkeypatch.setattr("model_preparation.serve.choose_engine.installed_vllm", lambda: "0.32.1")
    grafted = {"llama_layers": [1, 2], "llama_cfg": tiny_llama_cfg()}
    unserved = {
        "grafted heads": {"llama_heads": {"1": [0]}, "llama_cfg": tiny_llama_cfg()},
        **{f"from a {kind} model": {**grafted, "donor_type": kind} for kind in KINDS if kind != "llama"},
        "different settings": {**grafted, "other_llama_cfgs": {"2": {"rms_norm_eps": 1e-3}}},
        "activation relu": {"mlp_cfg": {"intermediate_size": 48, "act_fn": "relu"}},
        "activation gelu": {**grafted, "llama_cfg": {**tiny_llama_cfg(), "hidden_act": "gelu"}},
    }
    for served in ({}, grafted):
        assert choose_engine("auto", tiny_config(**served).to_dict()) == "vllm"
    for words, fields in unserved.items():
        config = tiny_config(**fields).to_dict()
        assert choose_engine("auto", config) == "transformers"
        with pytest.raises(SurgeryError, match=rf"{words}.*--engine transformers"):
            choose_engine("vllm", config)


# The fields in the publishers' config.json.
PUBLISHED = {
    "Qwen3-8B": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288},
        **{"rope_theta": 1000000, "rope_scaling": None, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6},
        **{"attention_bias": False, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36},
    },
    "Qwen2.5-7B": {
        **{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944},
        **{"rope_theta": 1000000.0, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
        **{"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28},
    },
    "Mistral-7B-v0.3": {
        **{"model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336},
        **{"rope_theta": 1000000.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": None},
    },
}


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("Qwen3-8B", 399, 8_190_735_360), ("Qwen2.5-7B", 339, 7_615_616_512), ("Mistral-7B-v0.3", 291, 7_248_023_552)],
)
def test_names_and_shapes_of_the_published_models(name, tensors, parameters, tmp_path):
    fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **fields}))
    donor = read_config(tmp_path)
    width, inner, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    head_dim = fields.get("head_dim", width // fields["num_attention_heads"])
    queries, keys = fields["num_attention_heads"] * head_dim, fields["num_key_value_heads"] * head_dim
    wanted = {"backbone.embedding.weight": [fields["vocab_size"], width], "backbone.final_layernorm.weight": [width]}
    wanted["lm_head.weight"] = [fields["vocab_size"], width]
    for index in range(layers):
        layer = {
            "input_layernorm.weight": [width],
            "post_attention_layernorm.weight": [width],
            "self_attn.q_proj.weight": [queries, width],
            "self_attn.k_proj.weight": [keys, width],
            "self_attn.v_proj.weight": [keys, width],
            "self_attn.o_proj.weight": [width, queries],
            "mlp.gate_proj.weight": [inner, width],
            "mlp.up_proj.weight": [inner, width],
            "mlp.down_proj.weight": [width, inner],
        }
        if donor.model_type == "qwen2":
            layer |= {
                f"self_attn.{which}_proj.bias": [size] for which, size in zip("qkv", (queries, keys, keys), strict=True)
            }
        if donor.model_type == "qwen3":
            layer |= {"self_attn.q_norm.weight": [head_dim], "self_attn.k_norm.weight": [head_dim]}
        wanted |= {f"backbone.layers.{index}.{name}": shape for name, shape in layer.items()}
    config = LlambaConfig(
        **{
            **llamba_config(donor).file_fields(),  # a base can be made from it
            "llama_layers": list(range(layers)),
            "llama_cfg": KINDS[donor.model_type].settings(donor),
            "donor_type": donor.model_type,
        }
    )
    model = empty_model(config)
    assert {name: list(parameter.shape) for name, parameter in model.named_parameters()} == wanted
    assert len(wanted) == tensors
    assert sum(map(math.prod, wanted.values())) == parameters
    assert set(config.layer_types) == {"full_attention"}


def test_donors_of_two_kinds_are_named(base_dir, layers_dir, tmp_path):
    """The error names the kinds, even if the settings differ only where donors of one kind may differ."""
    kind = KINDS["mistral"]
    config = kind.transformers_class("Config")(**donor_fields(kind, rms_norm_eps=1e-3, tie_word_embeddings=False))
    seeded(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "mistral")
    make_tokenizer().save_pretrained(tmp_path / "mistral")
    extract_layers(str(tmp_path / "mistral"), tmp_path / "layers")
    build_checkpoint(str(base_dir), [1], layers_dir, tmp_path / "first")
    with pytest.raises(SurgeryError, match="donor of layer 3 is a mistral model, but the first donor is a llama model"):
        build_checkpoint(str(tmp_path / "first"), [3], tmp_path / "layers", tmp_path / "second")
