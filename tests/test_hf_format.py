"""--format hf and both: what is written, that it opens without this package, and what siblings share."""

import hashlib
import json
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import check_imports

from model_preparation import SurgeryError, build_checkpoint, load_checkpoint
from model_preparation.checkpoint.checkpoint_info import FORMATS
from model_preparation.checkpoint.verify import verify
from model_preparation.io import known_digests
from model_preparation.io.digests import describe_file
from model_preparation.io.folder_lock import take
from model_preparation.io.self_checksum import with_checksum
from model_preparation.llamba import LlambaForCausalLM, modeling_llamba
from tests.conftest import PACKAGE, assert_refused, run_command, run_python, seeded, tiny_config

IDS = [[5, 17, 99, 3, 42, 8]]
MODEL_FILES = {
    *("cache_llamba.py", "configuration_llamba.py", "donor_kinds.py", "head_attention.py", "mixer.py"),
    *("modeling_llamba.py", "packing.py", "ssd.py", "transformers_versions.py"),
}
SHARDS = {f"{name}.safetensors" for name in ("embedding", "layer_00", "layer_01", "layer_02", "layer_03", "head")}
HF_FILES = {
    *MODEL_FILES,
    *SHARDS,
    *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"),
    *("tokenizer_config.json", "tensor_digests.json", "checkpoint_info.json", "README.txt"),
}
PT_FILES = {"model.pt", "model_state_dict.pt", "tokenizer", "tensor_digests.json", "checkpoint_info.json", "README.txt"}

# The text of a sitecustomize.py, which Python imports when it starts.
WITHOUT_OUR_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "model_preparation":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

LM_EVAL_TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [{"question": f"{letter} is", "choices": ["one", "two", "six"], "answer": 1} for letter in "abcdefgh"]

# lm-eval's command first, in this same process: importing torch and lm-eval takes longer than all the rest.
PROBE = """
import functools, lm_eval.tasks, os, runpy, sys, torch
# lm-eval's 14,000 default tasks are left out.
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
folder = sys.argv.pop(1)
sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True"]
sys.argv += ["--tasks", "tiny", "--include_path", ".", "--device", "cpu", "--output_path", "results", "--log_samples"]
runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
trusted = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
ids = torch.tensor(IDS)
found = {"logits": model(ids).logits, "text": tokenizer("Hello").input_ids, "layers": model.config.llama_layers}
found["tokens"] = model.generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False)
found["hidden"] = AutoModel.from_pretrained(folder, **trusted)(ids).last_hidden_state
found["bfloat16"] = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, device_map="cpu", **trusted)(ids).logits
assert AutoConfig.from_pretrained(folder, **trusted).llama_layers == found["layers"]
model.save_pretrained("again")
found["again"] = AutoModelForCausalLM.from_pretrained("again", **trusted)(ids).logits
model = AutoModelForCausalLM.from_pretrained("saved_with_the_package", **trusted)
found["saved with the package"] = model(ids).logits
target = os.path.abspath("found.pt")
os.chdir(folder)
LINES_OF_README
found["README.txt"] = model(ids).logits
torch.save(found, target)
assert not [name for name in sys.modules if name.partition(".")[0] == "model_preparation"]
"""


def run_without_our_package(python: Path, script: str, *args: object, cwd: Path):
    """Run `script` in a process that cannot import our package. transformers caches folders' code in `cwd`.

    Args:
        python: has imported transformers already, so setting HF_MODULES_CACHE would have no effect.
    """
    set_cache = f"import transformers.dynamic_module_utils as code\ncode.HF_MODULES_CACHE = {str(cwd / 'modules')!r}\n"
    return run_python("-c", WITHOUT_OUR_PACKAGE + set_cache + script, *map(str, args), cwd=cwd, python=python)


def build(base, layers_dir, out, *args, layers=(1, 3)):
    return run_command(
        "create_replaced_model_checkpoint",
        *("--base", base, "--llama_layers_dir", layers_dir, "--output_dir", out, "--layers", *layers, *args),
    )


@pytest.fixture(scope="module")
def hf_dir(base_dir, layers_dir, tmp_path_factory) -> Path:
    """The checkpoint of `checkpoint_dir` in format hf, with a dot in its name. Copy it before changing it."""
    out = tmp_path_factory.mktemp("hf") / "tiny-1.3"
    result = build(base_dir, layers_dir, out, "--format", "hf")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Checkpoint is in {out}"
    return out


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def readme_blocks(folder: Path) -> list[str]:
    """The Python in README.txt, block by block."""
    blocks = re.findall(r"(?:^    .*\n)+", (folder / "README.txt").read_text(), re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_what_transformers_reads_and_every_file_is_recorded(hf_dir, checkpoint_dir):
    assert names_in(hf_dir) == HF_FILES
    info = json.loads((hf_dir / "checkpoint_info.json").read_text())
    assert info["format"] == "hf"
    assert info["files"].keys() == HF_FILES - {"checkpoint_info.json"}
    for name, entry in info["files"].items():
        data = (hf_dir / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    of_pt = json.loads((checkpoint_dir / "checkpoint_info.json").read_text())
    assert of_pt["format"] == "pt"
    for field in ("config", "base_model", "replacement_source", "parameters", "generation_config"):
        assert info[field] == of_pt[field]


def test_the_shards_hold_the_state_dict_of_the_other_format(hf_dir, checkpoint_dir):
    state_dict = torch.load(checkpoint_dir / "model_state_dict.pt")
    index = json.loads((hf_dir / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state_dict.keys()
    assert set(index["weight_map"].values()) == SHARDS
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state_dict.values())
    for shard in SHARDS:
        for name, tensor in load_file(hf_dir / shard).items():
            assert index["weight_map"][name] == shard
            assert torch.equal(tensor, state_dict.pop(name))
    assert not state_dict


@pytest.fixture(scope="module")
def without_our_package(hf_dir, tmp_path_factory) -> Path:
    """A folder with what PROBE found and lm-eval wrote. Their interpreter cannot import our package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "absent").mkdir()
    (folder / "absent" / "sitecustomize.py").write_text(WITHOUT_OUR_PACKAGE)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tiny.yaml").write_text(LM_EVAL_TASK.replace("QUESTIONS", str(folder / "questions.jsonl")))
    load_checkpoint(hf_dir)[0].save_pretrained(folder / "saved_with_the_package")
    homes = {name: str(folder / name) for name in ("HF_HOME", "HF_MODULES_CACHE")}
    script = PROBE.replace("IDS", str(IDS)).replace("LINES_OF_README", readme_blocks(hf_dir)[1])
    result = run_python("-c", script, str(hf_dir), cwd=folder, PYTHONPATH=str(folder / "absent"), **homes)
    assert result.returncode == 0, result.stderr
    return folder


def test_transformers_opens_it_without_our_package(without_our_package, checkpoint_dir):
    found = torch.load(without_our_package / "found.pt")
    model, tokenizer = load_checkpoint(checkpoint_dir)
    logits = logits_of(model)
    assert torch.equal(found["logits"], logits)
    for way in ("again", "saved with the package", "README.txt"):
        assert torch.equal(found[way], logits)
    assert (
        (found["bfloat16"].float() - logits).abs().max() / logits.std()
    ).item() < 0.3  # weights far larger than a real model's
    assert found["bfloat16"].dtype == torch.bfloat16
    assert torch.equal(found["hidden"], model.backbone(torch.tensor(IDS)).last_hidden_state)
    assert found["text"] == tokenizer("Hello").input_ids
    assert found["layers"] == [1, 3]
    ids = torch.tensor(IDS)
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found["tokens"], ids)


@torch.no_grad()
def test_lm_eval_scores_it_without_our_package(without_our_package, checkpoint_dir):
    [results] = (without_our_package / "results").glob("*/results_*.json")
    [samples] = (without_our_package / "results").glob("*/samples_*.jsonl")
    model, tokenizer = load_checkpoint(checkpoint_dir)
    right = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        scores = []
        for choice in sample["doc"]["choices"]:
            prompt = tokenizer(sample["doc"]["question"]).input_ids
            answer = tokenizer(" " + choice).input_ids
            predicted = model(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            scores.append(predicted.gather(1, torch.tensor(answer)[:, None]).sum().item())
        found = [
            float(response[0][0] if isinstance(response[0], list) else response[0]) for response in sample["resps"]
        ]
        assert found == pytest.approx(scores, abs=1e-3)
        right += scores.index(max(scores)) == sample["doc"]["answer"]
    accuracy = json.loads(results.read_text())["results"]["tiny"]["acc,none"]
    assert accuracy == right / len(QUESTIONS)


def test_no_file_that_travels_asks_for_a_package_that_is_not_there(hf_dir):
    """transformers refuses a file that imports a missing package. The optional GPU kernels are missing."""
    for name in MODEL_FILES:
        assert all(f"{needed}.py" in MODEL_FILES for needed in check_imports(hf_dir / name))
        assert "model_preparation" not in (hf_dir / name).read_text()
        assert (hf_dir / name).read_bytes() == (PACKAGE / "llamba" / name).read_bytes()


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_with_our_package_its_own_class_is_taken_and_nothing_is_asked(hf_dir, trust, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question was asked"))
    model = AutoModelForCausalLM.from_pretrained(hf_dir, **trust)
    assert type(model) is LlambaForCausalLM
    assert type(AutoConfig.from_pretrained(hf_dir, **trust)) is type(model.config)
    assert AutoTokenizer.from_pretrained(hf_dir, **trust)("Hello").input_ids
    assert model.generation_config.eos_token_id == 257
    assert modeling_llamba.__name__ == "model_preparation.llamba.modeling_llamba"  # as model.pt names it
    assert torch.equal(logits_of(model), logits_of(load_checkpoint(hf_dir)[0]))


def test_load_checkpoint_and_the_test_command_take_it(hf_dir, checkpoint_dir, tmp_path, monkeypatch):
    model, tokenizer = load_checkpoint(hf_dir)
    assert torch.equal(logits_of(model), logits_of(load_checkpoint(checkpoint_dir)[0]))
    assert tokenizer("Hello").input_ids == load_checkpoint(checkpoint_dir)[1]("Hello").input_ids
    assert model.generation_config.eos_token_id == 257
    if Path("/proc/self/maps").exists():
        assert str(hf_dir / "layer_02.safetensors") in Path("/proc/self/maps").read_text()
    before = (hf_dir / "head.safetensors").read_bytes()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert (hf_dir / "head.safetensors").read_bytes() == before
    assert load_checkpoint(hf_dir, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    [block, _] = readme_blocks(hf_dir)
    monkeypatch.chdir(hf_dir)
    exec(block, names := {})
    assert torch.equal(logits_of(names["model"]), logits_of(load_checkpoint(checkpoint_dir)[0]))
    result = run_command("test_checkpoint", "--checkpoint", hf_dir, "--max_new_tokens", 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 of 4 layers: 1 3" in result.stdout


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", "layer_02.safetensors cannot be read as tensors"),
        ("missing", "layer_02.safetensors is missing"),
        ("no index", "has no weights"),
        ("outside", "is outside its folder"),
        ("foreign", "model.safetensors does not belong to this checkpoint"),
        ("other", r"backbone.layers.3.input_layernorm.weight has shape none instead of \[32\]"),
    ],
)
def test_damage_is_named(hf_dir, tmp_path, damage, words):
    folder = Path(shutil.copytree(hf_dir, tmp_path / "copy"))
    shard, index = folder / "layer_02.safetensors", folder / "model.safetensors.index.json"
    if damage == "cut":
        data = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(data[:-10])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no index":
        index.unlink()
    elif damage == "foreign":
        shutil.copyfile(shard, folder / "model.safetensors")
    elif damage == "outside":
        index.write_text(index.read_text().replace("layer_02.safetensors", "../layer_02.safetensors"))
    else:
        fields = json.loads(index.read_text())
        del fields["weight_map"]["backbone.layers.3.input_layernorm.weight"]
        index.write_text(json.dumps(fields))
    with pytest.raises(SurgeryError, match=words):
        load_checkpoint(folder)


def test_a_sibling_writes_only_its_own_layers(base_dir, layers_dir, hf_dir, tmp_path):
    parent = tmp_path / "checkpoints"
    shutil.copytree(hf_dir.parent / ".base_shards", parent / ".base_shards")
    stored = {path: path.stat().st_ino for path in parent.rglob("*.safetensors")}
    out = parent / "sibling"
    result = build(base_dir, layers_dir, out, "--format", "hf", layers=(1,))
    assert result.returncode == 0, result.stderr
    new = set((parent / ".base_shards").rglob("*.safetensors")) - stored.keys()
    assert [path.name for path in new] == ["layer_03.safetensors"]  # the base's own layer 3
    for name in SHARDS - {"layer_01.safetensors"}:
        [in_store] = (parent / ".base_shards").glob(f"*/{name}")
        assert (out / name).read_bytes() == in_store.read_bytes()
        if (out / name).stat().st_nlink > 1:  # not where files are shared as reflinks
            assert (out / name).samefile(in_store)
            assert in_store.stat().st_mode & 0o222 == 0
    assert (out / "layer_01.safetensors").stat().st_nlink == 1
    name = "backbone.layers.3.mixer.D"
    assert torch.equal(load_file(out / "layer_03.safetensors")[name], torch.load(base_dir / "pytorch_model.bin")[name])


def test_both_formats_in_one_folder(base_dir, layers_dir, hf_dir, checkpoint_dir, tmp_path):
    out = tmp_path / "both"
    info = build_checkpoint(str(base_dir), [1, 3], layers_dir, out, description="a tiny pair", format="both")
    assert info["format"] == "both"
    assert names_in(out) == HF_FILES | PT_FILES
    assert info["files"].keys() == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {
        "checkpoint_info.json"
    }
    for name in ("model.pt", "model_state_dict.pt"):
        assert (out / name).read_bytes() == (checkpoint_dir / name).read_bytes()
    for name in HF_FILES - {"checkpoint_info.json", "README.txt"}:
        assert (out / name).read_bytes() == (hf_dir / name).read_bytes()
    assert torch.equal(logits_of(load_checkpoint(out)[0]), logits_of(LlambaForCausalLM.from_pretrained(out)))


def test_a_tied_base_has_no_head_of_its_own(layers_dir, tmp_path):
    seeded(LlambaForCausalLM(tiny_config(tie_embeddings=True))).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    build_checkpoint(str(tmp_path / "base"), [2], layers_dir, out, format="hf", dtype=torch.bfloat16)
    assert load_file(out / "head.safetensors").keys() == {"backbone.final_layernorm.weight"}
    model, _ = load_checkpoint(out)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(out)))


def test_the_plan_counts_what_will_be_written(base_dir, layers_dir, hf_dir, tmp_path, monkeypatch):
    def to_write(parent: Path, name: str, format: str) -> str:
        result = build(base_dir, layers_dir, parent / name, "--format", format, "--dry_run")
        assert result.returncode == 0, result.stderr
        return next(line for line in result.stdout.splitlines() if line.startswith("To write"))

    grafted, whole = (
        sum((hf_dir / name).stat().st_size for name in names)
        for names in (["layer_01.safetensors", "layer_03.safetensors"], SHARDS)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_digests, "_WORTH_BYTES", 0)
    monkeypatch.setattr(known_digests, "_SETTLED_SECONDS", -1)
    parent = tmp_path / "checkpoints"
    assert f" {whole / 1000:.1f} kB;" in to_write(parent, "first", "hf")
    assert not parent.exists()
    assert build(base_dir, layers_dir, parent / "first", "--format", "hf").returncode == 0
    assert f" {grafted / 1000:.1f} kB;" in to_write(parent, "second", "hf")
    weights = int(json.loads((hf_dir / "model.safetensors.index.json").read_text())["metadata"]["total_size"])
    assert f" {(grafted + 2 * weights) / 1000:.1f} kB;" in to_write(parent, "second", "both")
    assert f" {2 * weights / 1000:.1f} kB in" in to_write(parent, "second", "pt")
    # There is room for the grafted layers only. They fit, even where the base's digests are not cached.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64_000_000 + grafted + 1000))
    assert_refused(build(base_dir, layers_dir, tmp_path / "elsewhere", "--format", "hf"), "are free on its disk")
    shutil.rmtree(tmp_path / "cache")
    assert build(base_dir, layers_dir, parent / "second", "--format", "hf").returncode == 0


def test_an_unchanged_base_is_read_for_its_digests_once(base_dir, layers_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_digests, "_WORTH_BYTES", 0)
    monkeypatch.setattr(known_digests, "_SETTLED_SECONDS", -1)
    read, blake3_of = [], known_digests.blake3_of
    monkeypatch.setattr(known_digests, "blake3_of", lambda path: read.append(path) or blake3_of(path))
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    infos = [build_checkpoint(str(base), [1], layers_dir, tmp_path / "out" / form, format=form) for form in FORMATS]
    weights = base / "pytorch_model.bin"
    assert sorted(read) == [base / "config.json", weights]
    assert infos[0]["base_model"]["files"] == infos[1]["base_model"]["files"] == infos[2]["base_model"]["files"]
    before, state = weights.stat(), torch.load(weights)
    state["backbone.final_layernorm.weight"][0] += 1
    torch.save(state, weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # set back
    assert (weights.stat().st_size, weights.stat().st_ino) == (before.st_size, before.st_ino)
    changed = build_checkpoint(str(base), [1], layers_dir, tmp_path / "out" / "changed", format="hf")
    assert changed["base_model"]["files"] != infos[0]["base_model"]["files"]
    assert changed["digests"]["weights"] != infos[0]["digests"]["weights"]


def test_a_format_that_does_not_exist(base_dir, layers_dir, tmp_path):
    assert_refused(build(base_dir, layers_dir, tmp_path / "out", "--format", "gguf"), "invalid choice", code=2)
    with pytest.raises(SurgeryError, match="'gguf' is not a format"):
        build_checkpoint(str(base_dir), [1], layers_dir, tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())


def test_clean_checkpoints(base_dir, layers_dir, hf_dir, tmp_path):
    shutil.copytree(hf_dir.parent / ".base_shards", tmp_path / ".base_shards")
    result = run_command("clean_checkpoints", "--dir", tmp_path, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "0 folders of killed builds, and 4 stored files (" in result.stdout.splitlines()[-1]
    assert "would be removed" in result.stdout
    assert build(base_dir, layers_dir, tmp_path / "out", "--format", "hf", layers=(0, 1, 3)).returncode == 0
    (tmp_path / "killed.partial").mkdir()
    (tmp_path / "killed.partial" / ".held_by").touch()
    result = run_command("clean_checkpoints", "--dir", tmp_path)
    assert [Path(line).name for line in result.stdout.splitlines()[:-1]] == ["killed.partial", "layer_00.safetensors"]
    assert "1 folders of killed builds, and 1 stored files (" in result.stdout.splitlines()[-1]
    assert load_checkpoint(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert run_command("clean_checkpoints", "--dir", tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())
    assert_refused(run_command("clean_checkpoints", "--dir", tmp_path / "none"), "none is no folder")


@pytest.fixture
def old_code(hf_dir, tmp_path) -> Path:
    """A copy of `hf_dir` as another version of the package writes it, with a score and files added later."""
    folder = Path(shutil.copytree(hf_dir, tmp_path / "old code", copy_function=os.link))
    info = json.loads((folder / "checkpoint_info.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "gone.LlambaModel"
    replace(folder / "config.json", json.dumps(config))
    replace(folder / "mixer.py", (hf_dir / "mixer.py").read_text() + "# old\n")
    replace(folder / "gone.py", "class LlambaModel: ...\n")
    (folder / "ssd.py").unlink()
    del info["files"]["ssd.py"]
    for name in ("config.json", "mixer.py", "gone.py"):
        info["files"][name] = describe_file(folder / name)
    replace(folder / "checkpoint_info.json", with_checksum(info | {"mmlu_score": 0.5}).decode())
    (folder / "evaluations" / "mmlu").mkdir(parents=True)
    (folder / "evaluations" / "mmlu" / "result.json").write_text("{}")
    (folder / "README.md").write_text("Mine.\n")
    return folder


def replace(path: Path, text: str) -> None:
    """Write a file anew. The old one may be linked from another folder, and stays there."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def test_a_folder_with_other_code_is_told_and_brought_up_to_date(old_code, hf_dir, tmp_path):
    before = json.loads((old_code / "checkpoint_info.json").read_text())
    weights = {name: (old_code / name).stat().st_ino for name in SHARDS}
    for command, flags, stream in [("verify_checkpoint", [], "stdout"), ("inspect_checkpoint", ["--json"], "stderr")]:
        result = run_command(command, old_code, *flags)
        assert result.returncode == 0, result.stderr
        assert "(gone.py, mixer.py, ssd.py)" in getattr(result, stream)
        assert f"python update_checkpoint.py {old_code}" in getattr(result, stream)
    result = run_command("update_checkpoint", old_code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{old_code}: updated: gone.py, mixer.py, ssd.py"
    for name in HF_FILES - {"checkpoint_info.json"}:
        assert (old_code / name).read_bytes() == (hf_dir / name).read_bytes(), name
    assert names_in(old_code) == HF_FILES | {"evaluations", "README.md"}
    assert (old_code / "evaluations" / "mmlu" / "result.json").read_text() == "{}"
    assert (old_code / "README.md").read_text() == "Mine.\n"
    if (hf_dir / "head.safetensors").samefile(old_code / "head.safetensors"):  # not where files share extents
        assert {name: (old_code / name).stat().st_ino for name in SHARDS} == weights
    info = json.loads((old_code / "checkpoint_info.json").read_text())
    [update] = info.pop("code_updates")
    assert update["from"] == {name: e["sha256"] for name, e in before["files"].items() if name.endswith(".py")}
    assert update["to"] == {name: e["sha256"] for name, e in info["files"].items() if name.endswith(".py")}
    assert info["files"] == json.loads((hf_dir / "checkpoint_info.json").read_text())["files"]
    assert {**info, "files": 0, "info_sha256": 0} == {**before, "files": 0, "info_sha256": 0}
    found = verify(old_code)
    assert not found.faults
    assert not [note for note in found.notes if "code" in note]
    assert run_command("inspect_checkpoint", old_code).stderr == ""
    assert not list(tmp_path.glob("*.partial"))

    sealed = (old_code / "checkpoint_info.json").read_bytes()
    result = run_command("update_checkpoint", old_code, hf_dir)
    assert result.stdout.splitlines() == [
        f"{old_code}: already up to date",
        f"{hf_dir}: already up to date",
        "0 of 2 checkpoints updated; the others were up to date.",
    ]
    assert (old_code / "checkpoint_info.json").read_bytes() == sealed


def test_code_that_was_put_in_by_hand_is_no_fault_and_the_update_records_it(old_code):
    for name in ("mixer.py", "ssd.py"):
        replace(old_code / name, (PACKAGE / "llamba" / name).read_text())
    found = verify(old_code)
    assert not found.faults
    assert any("update_checkpoint.py" in note for note in found.notes)
    assert run_command("update_checkpoint", ".", cwd=old_code).returncode == 0
    assert not verify(old_code).notes[:-2]  # the last two notes name README.md and evaluations/
    assert len(json.loads((old_code / "checkpoint_info.json").read_text())["code_updates"]) == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("edited", "mixer.py is changed"),  # neither what is listed nor the package's
        ("weights", "layer_02.safetensors is changed"),
        ("saved", "has no checkpoint_info.json (save_pretrained writes none)"),
        ("newer", "newer model_preparation"),
        ("in use", "is being written by process"),
        ("no config", "lacks a field or has a wrong one"),
    ],
)
def test_what_is_not_updated_is_left_as_it_is(old_code, damage, words):
    shard, info_path = old_code / "layer_02.safetensors", old_code / "checkpoint_info.json"
    held = None
    if damage == "edited":
        replace(old_code / "mixer.py", "import os\n" + (old_code / "mixer.py").read_text()[10:])
    elif damage == "weights":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.unlink()
        shard.write_bytes(data)
    elif damage == "saved":
        info_path.unlink()
    elif damage == "in use":
        held = take(old_code / "evaluations" / "mmlu")
    else:
        info = json.loads(info_path.read_text())
        info["versions"]["model_preparation"] = "99.0"
        if damage == "no config":
            info["code_updates"] = "none"
            del info["files"]["config.json"]
            replace(old_code / "config.json", "{}")
            info["files"]["config.json"] = describe_file(old_code / "config.json")
        replace(info_path, with_checksum(info).decode())
    before = {path: path.read_bytes() for path in old_code.rglob("*") if path.is_file()}
    result = run_command("update_checkpoint", old_code)
    if held is not None:
        held.release()
        before = {path: data for path, data in before.items() if path.parent.name != "mmlu.partial"}
    assert_refused(result, words, str(old_code))
    assert {path: path.read_bytes() for path in old_code.rglob("*") if path.is_file()} == before
    assert names_in(old_code.parent) == {old_code.name}
    if damage == "edited":
        assert "mixer.py is changed" in run_command("verify_checkpoint", old_code).stdout


def test_one_folder_that_cannot_be_updated_does_not_stop_the_others(old_code, checkpoint_dir, tmp_path):
    result = run_command("update_checkpoint", tmp_path / "none", old_code, checkpoint_dir)
    assert_refused(result, f"{tmp_path / 'none'} is not there")
    assert result.stdout.splitlines()[-2:] == [
        f"{old_code}: updated: gone.py, mixer.py, ssd.py",
        f"{checkpoint_dir}: already up to date",  # of format pt, without code
    ]
