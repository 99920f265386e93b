"""A checkpoint is its recipe: the same bytes whenever and wherever it is built, from checkpoint_info.json alone too."""

import hashlib
import json
import shutil

import pytest
import torch

from model_preparation import __version__, extract_layers
from tests.conftest import assert_refused, run_command, run_fresh_command


def build(*args, **env):
    return run_command("create_replaced_model_checkpoint", *args, **env)


def bytes_of_files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_bytes_in_every_process_and_folder(base_dir, layers_dir, tmp_path):
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--layers", "1", "3", "--format", "both"]
    # A forked and a fresh process hash strings differently. Only the fresh one imports with HF_HUB_OFFLINE.
    for number, run in enumerate((run_command, run_fresh_command)):
        cwd = tmp_path / f"cwd{number}"
        cwd.mkdir()
        out = tmp_path / f"parent{number}" / f"name{number}"
        result = run(
            *("create_replaced_model_checkpoint", *flags, "--output_dir", out),
            cwd=cwd,
            SOURCE_DATE_EPOCH="1750000000",
        )
        assert result.returncode == 0, result.stderr
    first, second = (bytes_of_files(tmp_path / f"parent{number}" / f"name{number}") for number in (0, 1))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert json.loads(first["checkpoint_info.json"])["creation_time"] == "2025-06-15T15:06:40+00:00"


def test_extracted_layers_are_the_same_bytes_too(donor_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    for name in ("a", "b"):
        extract_layers(str(donor_dir), tmp_path / name)
    assert bytes_of_files(tmp_path / "a") == bytes_of_files(tmp_path / "b")


def test_a_source_date_that_is_none(base_dir, layers_dir, tmp_path):
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--layers", "1", "--output_dir", tmp_path / "out"]
    assert_refused(build(*flags, SOURCE_DATE_EPOCH="yesterday"), "SOURCE_DATE_EPOCH is 'yesterday'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["pt", "hf", "both"])
def test_the_recipe_alone_gives_the_checkpoint(base_dir, layers_dir, tmp_path, format):
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--layers", "0", "2", "--dtype", "bfloat16"]
    flags += ["--description", "两层", "--score", "0.5", "--format", format, "--output_dir", tmp_path / "first"]
    assert build(*flags).returncode == 0
    recipe = shutil.copy(tmp_path / "first" / "checkpoint_info.json", tmp_path / "recipe.json")
    result = build("--from_info", recipe, "--llama_layers_dir", layers_dir, "--output_dir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Checkpoint is in {tmp_path / 'again'}"
    first, again = bytes_of_files(tmp_path / "first"), bytes_of_files(tmp_path / "again")
    assert [name for name in first if first[name] != again.get(name)] in ([], ["checkpoint_info.json"])
    assert first.keys() == again.keys()


def test_layers_that_were_not_extracted_are_taken_from_the_donor(checkpoint_dir, tmp_path):
    flags = ["--from_info", checkpoint_dir, "--llama_layers_dir", tmp_path / "layers", "--output_dir", tmp_path / "out"]
    result = build(*flags)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "layers").glob("layer_*.pt")) == ["layer_01.pt", "layer_03.pt"]
    assert (tmp_path / "out" / "model.pt").read_bytes() == (checkpoint_dir / "model.pt").read_bytes()


@pytest.fixture
def recipe(checkpoint_dir) -> dict:
    return json.loads((checkpoint_dir / "checkpoint_info.json").read_text())


def test_what_is_not_as_the_recipe_says_is_named(recipe, base_dir, layers_dir, tmp_path):
    def rebuilt(changed, *args):
        (tmp_path / "recipe.json").write_text(json.dumps(changed))
        flags = ["--from_info", tmp_path / "recipe.json", "--llama_layers_dir", layers_dir]
        result = build(*flags, "--output_dir", tmp_path / "out", *args)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json"]
        return result

    def changed(*keys, to):
        copy = json.loads(json.dumps(recipe))
        *outer, last = keys
        place = copy
        for key in outer:
            place = place[key]
        place[last] = to
        return copy

    digest = "0" * 64
    of_base = changed("base_model", "files", "pytorch_model.bin", "blake3", to=digest)
    assert_refused(rebuilt(of_base), "is not the recipe's base (pytorch_model.bin: the content has changed)")
    of_donor = changed("digests", "donor_layers", "3", to=digest)
    assert_refused(rebuilt(of_donor), "layer_03.pt is not the layer of the recipe")
    of_file = changed("files", "model.pt", "sha256", to=digest)
    assert_refused(rebuilt(of_file), "The new checkpoint differs from the recipe in model.pt")
    of_tensors = changed("digests", "weights", to=digest)
    of_tensors["versions"]["torch"] = "1.0"
    assert_refused(
        rebuilt(of_tensors), "The new checkpoint is not the recipe's model (weights: the content has changed)"
    )
    of_config = changed("config", "llama_cfg", "rms_norm_eps", to=0.5)
    assert_refused(rebuilt(of_config), "config llama_cfg rms_norm_eps: was 0.5, is now 0.0001")
    of_tokenizer = changed("files", "tokenizer/tokenizer.json", "sha256", to=digest)
    of_tokenizer["code"]["package"] = digest
    assert_refused(rebuilt(of_tokenizer), "recipe in tokenizer/tokenizer.json, but")
    of_vocabulary = changed("files", "tokenizer/tokenizer_config.json", "sha256", to=digest)
    of_vocabulary["digests"]["tokenizer"] = digest
    for version in ("5.24.0", "4.0"):
        of_vocabulary["versions"]["transformers"] = version
        assert_refused(rebuilt(of_vocabulary), "tokenizer is not the recipe's: base or donor has another one now")
    elsewhere = changed("base_model", "path", to="relative")
    assert_refused(rebuilt(elsewhere), "but it is not here. Say where it is by --base")
    short = {key: value for key, value in recipe.items() if key != "replacement_source"}
    assert_refused(rebuilt(short), "lacks a field or has a wrong one (KeyError('replacement_source'))")
    assert_refused(build("--from_info", layers_dir / "metadata.json", "--output_dir", tmp_path / "out"), "is no recipe")
    assert_refused(rebuilt(recipe, "--dry_run"), "the recipe is the plan", code=2)
    assert_refused(rebuilt(recipe, "--layers", "1"), "give --layers, --heads or --ungraft", code=2)
    for flag in (["--dtype", "float32"], ["--format", "pt"], ["--description", ""]):  # also the defaults
        assert_refused(rebuilt(recipe, *flag), f"{flag[0]} is a part of the recipe", code=2)
    assert_refused(build("--output_dir", tmp_path / "out"), "give --layers, --heads or --ungraft", code=2)


def test_a_source_under_another_name_is_the_same(recipe, layers_dir, tmp_path):
    recipe["replacement_source"]["id"] = "another name for the same layers"
    recipe["files"]["README.txt"]["sha256"] = "0" * 64
    flags = ["--from_info", tmp_path / "recipe.json", "--llama_layers_dir", layers_dir]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    result = build(*flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr


def test_layers_imported_from_old_files_are_asked_for(recipe, tmp_path):
    recipe["replacement_source"]["legacy"] = True
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    flags = ["--from_info", tmp_path / "recipe.json", "--llama_layers_dir", tmp_path / "none"]
    assert_refused(build(*flags, "--output_dir", tmp_path / "out"), "--from_legacy DIR --trust_pickle")


def test_what_the_same_programs_wrote_with_and_without_hf_hub_offline_is_no_fault(recipe, layers_dir, tmp_path):
    recipe["files"]["tokenizer/tokenizer_config.json"]["sha256"] = "0" * 64
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    flags = ["--from_info", tmp_path / "recipe.json", "--llama_layers_dir", layers_dir]
    result = build(*flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "tokenizer_config.json differs, but the tokenizer is equal: one build had HF_HUB_OFFLINE" in result.stdout


def test_other_versions_of_the_programs_are_no_fault(recipe, layers_dir, tmp_path):
    recipe["versions"]["transformers"] = "4.0"
    recipe["files"]["tokenizer/tokenizer_config.json"]["sha256"] = "0" * 64
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    flags = ["--from_info", tmp_path / "recipe.json", "--llama_layers_dir", layers_dir]
    result = build(*flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "Every tensor is as" in result.stdout
    assert "wrote other bytes in tokenizer/tokenizer_config.json (transformers: was 4.0" in result.stdout


def test_recipes_of_other_code_and_of_old_versions_give_the_model(base_dir, layers_dir, checkpoint_dir, tmp_path):
    """A recipe of the project's first day, and one of an hf folder with other model code."""

    def rebuilt(recipe: dict, name: str) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe))
        flags = ["--from_info", tmp_path / f"{name}.json", "--llama_layers_dir", layers_dir]
        result = build(*flags, "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
        return result.stdout

    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--layers", "1", "3", "--format", "hf"]
    assert build(*flags, "--output_dir", tmp_path / "hf").returncode == 0
    other = json.loads((tmp_path / "hf" / "checkpoint_info.json").read_text())
    other["code"]["modeling_llamba.py"] = other["files"]["modeling_llamba.py"]["sha256"] = "0" * 64
    del other["files"]["ssd.py"]
    measured = {"score": 0.5, "stderr": 0.1, "questions": 4, "lm_eval_version": "0.4.13", "settings": {}}
    other |= {"mmlu_score": 0.5, "mmlu_result": {**measured, "model": {"weights": other["digests"]["weights"]}}}
    told = rebuilt(other, "other")
    assert "wrote other bytes in modeling_llamba.py, ssd.py (modeling_llamba.py: the content has changed)" in told
    assert json.loads((tmp_path / "other" / "checkpoint_info.json").read_text())["mmlu_score"] == 0.5
    other["mmlu_result"]["model"]["weights"] = "1" * 64
    assert "The MMLU score is left out" in rebuilt(other, "scored")
    info = json.loads((tmp_path / "scored" / "checkpoint_info.json").read_text())
    assert (info["mmlu_score"], "mmlu_result" in info) == (None, False)

    first = json.loads((checkpoint_dir / "checkpoint_info.json").read_text())
    for name in ("digests", "code", "format", "tokenizer_source"):
        del first[name]
    del first["files"]["tensor_digests.json"]
    first["versions"]["model_preparation"] = "0.1.0"
    first["config"] |= {"architectures": None, "_name_or_path": str(base_dir)}
    for name in ("model.pt", "model_state_dict.pt"):
        first["files"][name]["sha256"] = "0" * 64
    for name, entry in first["base_model"]["files"].items():
        del entry["blake3"]
        entry["sha256"] = hashlib.sha256((base_dir / name).read_bytes()).hexdigest()
    for index in first["replacement_source"]["layers"]:
        path = tmp_path / f"layer_{index:0>2}.pt"
        torch.save({name: tensor.clone() for name, tensor in torch.load(layers_dir / path.name).items()}, path)
        first["replacement_source"]["layers"][index] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"in model.pt, model_state_dict.pt (model_preparation: was 0.1.0, is now {__version__})" in rebuilt(
        first, "first"
    )
    assert (tmp_path / "first" / "model.pt").read_bytes() == (checkpoint_dir / "model.pt").read_bytes()
    first["replacement_source"]["layers"]["3"] = "0" * 64
    (tmp_path / "first.json").write_text(json.dumps(first))
    flags = ["--from_info", tmp_path / "first.json", "--llama_layers_dir", layers_dir, "--output_dir", tmp_path / "no"]
    assert_refused(build(*flags), "layer_03.pt is not the layer of the recipe: its tensors differ")
