"""extract_layers.py: what it writes, and that every damage to it is noticed and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from model_preparation import build_checkpoint, extract_layers
from model_preparation.checkpoint.layer_store import LayerStore, ModelLayers
from model_preparation.checkpoint.llamba_init import init_llamba_base
from model_preparation.checkpoint.model_digests import blake3_of_tensors
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import load_folder
from model_preparation.hub.sources import resolve
from model_preparation.modelscope_utils import get_model_modelscope
from model_preparation.train.distill.self_sampling import SelfSampler
from tests.conftest import assert_refused, run_command, run_fresh_command


@pytest.fixture
def damaged(layers_dir, tmp_path) -> Path:
    """A copy of the extracted layers, to be damaged."""
    return Path(shutil.copytree(layers_dir, tmp_path / "layers"))


def test_layer_files_are_plain_dicts_of_the_donors_tensors(layers_dir, donor_dir):
    donor = load_file(donor_dir / "model.safetensors")
    for index in range(4):
        layer = torch.load(layers_dir / f"layer_{index:02d}.pt", weights_only=True, mmap=True)
        assert type(layer) is dict
        prefix = f"model.layers.{index}."
        assert {prefix + name for name in layer} == {name for name in donor if name.startswith(prefix)}
        assert all(torch.equal(tensor, donor[prefix + name]) for name, tensor in layer.items())


def test_metadata_says_what_it_takes_to_use_the_layers(layers_dir, donor_dir):
    metadata = json.loads((layers_dir / "metadata.json").read_text())
    assert metadata["format_version"] == 1
    assert metadata["model_name"] == str(donor_dir)
    assert metadata["source"]["hub"] == "local"
    assert (metadata["total_layers"], metadata["num_heads"], metadata["head_dim"]) == (4, 2, 16)
    assert metadata["dtype"] == "float32"
    assert metadata["config"]["rms_norm_eps"] == 1e-4
    assert metadata["versions"].keys() >= {"model_preparation", "torch", "transformers"}
    layer = metadata["layers"]["2"]
    assert layer["file"] == "layer_02.pt"
    assert layer["bytes"] == (layers_dir / "layer_02.pt").stat().st_size
    assert layer["parameters"] == sum(t.numel() for t in torch.load(layers_dir / "layer_02.pt").values())
    assert set(metadata["files"]) >= {"rotary_emb.pt", "tokenizer/tokenizer.json"}


def test_rotary_embedding_and_tokenizer_travel_along(layers_dir, donor_dir):
    rotary = torch.load(layers_dir / "rotary_emb.pt", weights_only=True)
    expected = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(rotary["inv_freq"], expected)
    assert rotary["attention_scaling"] == 1.0
    text = "Layers, 11 and 13."
    given, kept = (AutoTokenizer.from_pretrained(folder) for folder in (donor_dir, layers_dir / "tokenizer"))
    assert kept(text).input_ids == given(text).input_ids


def test_the_command_extracts_chosen_layers_in_a_dtype(donor_dir, tmp_path):
    out = tmp_path / "out"
    result = run_command(
        "extract_layers", "--model_name", donor_dir, "--output-dir", out, "--layers", 3, 1, "--dtype", "bfloat16"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Extracted layers are in {out}"
    assert sorted(path.name for path in out.glob("layer_*")) == ["layer_01.pt", "layer_03.pt"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in torch.load(out / "layer_03.pt").values())


def test_sharded_and_pickled_donors_give_the_same_layers(donor_dir, layers_dir, tmp_path):
    tensors = load_file(donor_dir / "model.safetensors")
    names = sorted(tensors)
    for layout in ("shards", "bin", "bin-shards"):
        folder = tmp_path / layout
        folder.mkdir()
        shutil.copy(donor_dir / "config.json", folder)
        if layout == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            suffix, stem = ("bin", "pytorch_model") if layout == "bin-shards" else ("safetensors", "model")
            save = torch.save if suffix == "bin" else save_file
            shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
            for shard, members in shards.items():
                save({name: tensors[name] for name in members}, folder / shard)
            index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        result = run_command("extract_layers", "--model_name", folder, "--output_dir", tmp_path / f"{layout}-out")
        assert result.returncode == 0, result.stderr
        for index in range(4):
            wanted, found = (
                torch.load(folder / f"layer_{index:02d}.pt") for folder in (layers_dir, tmp_path / f"{layout}-out")
            )
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def renamed_donor(donor: Path, folder: Path, prefix: str, head: str | None = "lm_head.weight") -> Path:
    """A copy of a donor. Its names begin with `prefix` instead of "model.". One tensor is for images."""
    folder.mkdir()
    for path in donor.iterdir():
        shutil.copy(path, folder)
    tensors = load_file(donor / "model.safetensors")
    heads = {head: tensors.pop("lm_head.weight")} if head else {}
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    images = {"vision_tower.layers.0.input_layernorm.weight": torch.ones(3)} if prefix else {}
    save_file(renamed | heads | images, folder / "model.safetensors")
    if prefix:
        text = json.loads((donor / "config.json").read_text())
        outer = {"model_type": "llava", "vision_config": {}, "text_config": text}
        (folder / "config.json").write_text(json.dumps(outer))
    return folder


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("model.text_model.", "lm_head.weight"),
    ],
)
def test_the_llama_in_a_multimodal_model_is_a_donor_like_any_other(donor_dir, layers_dir, tmp_path, prefix, head):
    folder = renamed_donor(donor_dir, tmp_path / "donor", prefix, head)
    extract_layers(str(folder), tmp_path / "layers")
    for path in layers_dir.glob("*.pt"):
        assert (tmp_path / "layers" / path.name).read_bytes() == path.read_bytes()
    wanted, found = LayerStore(layers_dir), ModelLayers(resolve(str(folder)))
    found.check([0, 3])
    assert found.ranges(3).keys() == wanted.ranges(3).keys()
    assert blake3_of_tensors(found.ranges(3)) == blake3_of_tensors(wanted.ranges(3))
    for donor, base in ((donor_dir, "from_plain"), (folder, "base")):
        init_llamba_base(str(donor), tmp_path / base)
    weights = [tmp_path / base / "model.safetensors" for base in ("from_plain", "base")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ids = torch.arange(20)[None]
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    plain, teacher = (load_folder(each, torch.float32) for each in (donor_dir, folder))
    assert torch.equal(teacher(ids).logits, plain(ids).logits)
    assert teacher.generation_config.eos_token_id == [257, 258]
    assert get_model_modelscope(str(folder))[2:] == (2, 16)
    config = found.config
    drawn = [SelfSampler(each, config, "cpu").draw(2, 9, 0, lambda tokens: None) for each in (donor_dir, folder)]
    assert torch.equal(*drawn)


def test_a_donor_saved_without_its_head_gives_its_layers_and_no_more(donor_dir, layers_dir, tmp_path):
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(donor_dir).model.save_pretrained(bare)
    shutil.copy(donor_dir / "tokenizer.json", bare)
    extract_layers(str(bare), tmp_path / "layers")
    for path in layers_dir.glob("*.pt"):
        assert (tmp_path / "layers" / path.name).read_bytes() == path.read_bytes()
    for use in (lambda: init_llamba_base(str(bare), tmp_path / "base"), lambda: load_folder(bare, None)):
        with pytest.raises(
            SurgeryError, match=r"no lm_head\.weight: .* from LlamaModel\. .* saved from LlamaForCausalLM"
        ):
            use()
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "torchao"}, "'torchao'"),
    ],
)
def test_a_quantised_model_is_refused_by_the_name_of_its_method(
    donor_dir, base_dir, layers_dir, tmp_path, fields, method
):
    for model in (donor_dir, base_dir):
        folder = Path(shutil.copytree(model, tmp_path / model.name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    words = rf"config\.json says that this model is quantised by {method}\. Give the unquantised model"
    with pytest.raises(SurgeryError, match=words):
        extract_layers(str(tmp_path / donor_dir.name), tmp_path / "out")
    with pytest.raises(SurgeryError, match=words):
        init_llamba_base(str(tmp_path / donor_dir.name), tmp_path / "out")
    with pytest.raises(SurgeryError, match=words):
        build_checkpoint(str(tmp_path / base_dir.name), [1], layers_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("qweight", torch.ones(4, 4, dtype=torch.int32), "int32 numbers, quantised by GPTQ or AWQ"),
        ("g_idx", torch.ones(4, dtype=torch.int32), "int32 numbers, quantised by GPTQ"),
        ("SCB", torch.ones(40), "int8 numbers, quantised by bitsandbytes"),
        ("weight_scale_inv", torch.ones(1, 1), "float8_e4m3fn numbers, quantised by FP8"),
        (None, None, "int8 numbers"),
    ],
)
def test_quantised_tensors_are_refused_where_no_config_tells(donor_dir, tmp_path, name, tensor, words):
    folder = tmp_path / "donor"
    folder.mkdir()
    shutil.copy(donor_dir / "config.json", folder)
    tensors = load_file(donor_dir / "model.safetensors")
    place = "model.layers.2.mlp.up_proj."
    if "GPTQ" in words:
        del tensors[f"{place}weight"]
    else:
        dtype = torch.int8 if "int8" in words else torch.float8_e4m3fn
        tensors[f"{place}weight"] = tensors[f"{place}weight"].to(dtype)
    if name:
        tensors[place + name] = tensor
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SurgeryError, match=words.partition(" ")[2]):
        extract_layers(str(folder), tmp_path / "out")
    if "FP8" not in words:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(SurgeryError, match=words if "GPTQ" not in words else words.partition(", ")[2]):
            extract_layers(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_llamba_s_layers_can_be_extracted(base_dir, tmp_path):
    result = run_command("extract_layers", "--model_name", base_dir, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    base = torch.load(base_dir / "pytorch_model.bin", weights_only=True)
    layer = torch.load(tmp_path / "out" / "layer_02.pt", weights_only=True)
    assert torch.equal(layer["mixer.in_proj.weight"], base["backbone.layers.2.mixer.in_proj.weight"])
    assert LayerStore(tmp_path / "out").metadata["num_heads"] == 2
    assert "extract the donor's layers" in result.stdout


def test_an_existing_folder_is_replaced_only_when_asked(damaged, donor_dir):
    (damaged / "README.md").write_text("keep me")
    again = ("--model_name", donor_dir, "--output_dir", damaged)
    assert_refused(run_command("extract_layers", *again), str(damaged), "exists already", "--overwrite")
    assert (damaged / "layer_03.pt").exists()
    assert run_command("extract_layers", *again, "--layers", 0, "--overwrite").returncode == 0
    assert sorted(path.name for path in damaged.glob("layer_*")) == ["layer_00.pt"]
    assert (damaged / "README.md").read_text() == "keep me"
    assert not list(damaged.parent.glob("*.partial*"))


def test_a_folder_with_other_files_is_left_alone(tmp_path, donor_dir):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run_command("extract_layers", "--model_name", donor_dir, "--output_dir", tmp_path, "--overwrite")
    assert_refused(result, "thesis.tex", "Choose another folder")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_verify_passes_what_is_whole(layers_dir):
    result = run_command("extract_layers", "--output_dir", layers_dir, "--verify")
    assert result.returncode == 0, result.stderr
    assert "All 4 layers" in result.stdout


def test_verify_names_every_bad_file(damaged):
    (damaged / "layer_00.pt").unlink()
    cut = damaged / "layer_01.pt"
    cut.write_bytes(cut.read_bytes()[:-100])
    flip_bit(damaged / "tokenizer" / "tokenizer.json", 1000)
    result = run_command("extract_layers", "--output_dir", damaged, "--verify")
    assert_refused(result, "3 bad files")
    out = result.stdout.replace("\n", " ")
    assert "layer_00.pt is missing" in out
    assert "layer_01.pt is" in out
    assert "tokenizer.json is changed" in out
    assert "layer_02.pt" not in out


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    path.write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), index=st.integers(0, 3))
def test_any_flipped_bit_is_found(layers_dir, tmp_path_factory, position, index):
    folder = tmp_path_factory.mktemp("flip")
    for name in ("metadata.json", f"layer_{index:02d}.pt"):
        shutil.copy(layers_dir / name, folder)
    flip_bit(folder / f"layer_{index:02d}.pt", position)
    with pytest.raises(Exception, match=f"layer_{index:02d}.pt is changed"):
        LayerStore(folder).check([index])


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--layers", 4], 1, ["Layer 4 is out of range", "layers 0 to 3"]),
        (["--layers", -1], 2, ["-1 is negative"]),
        (["--layers", 1, 1], 2, ["given more than once"]),
        (["--layers", "x"], 2, ["'x' is not a layer index"]),
        (["--layers"], 2, ["expected at least one argument"]),
        (["--dtype", "int8"], 2, ["invalid choice"]),
        (["--no_such_flag"], 2, ["unrecognized"]),
    ],
)
def test_bad_arguments(donor_dir, tmp_path, args, code, words):
    result = run_command("extract_layers", "--model_name", donor_dir, "--output_dir", tmp_path / "out", *args)
    assert_refused(result, *words, code=code)
    assert not list(tmp_path.iterdir())


def test_bad_donors(donor_dir, tmp_path):
    out = tmp_path / "out"
    broken = tmp_path / "broken"
    assert_refused(
        run_command("extract_layers", "--output_dir", out),
        "one of --model_name, --from_legacy and --verify is needed",
        code=2,
    )
    idle = run_command("extract_layers", "--output_dir", out, "--verify", "--layers", 1)
    assert_refused(idle, "--layers has no effect if nothing is extracted", code=2)
    assert_refused(run_command("extract_layers", "--model_name", broken, "--output_dir", out), "broken is not there")
    shutil.copytree(donor_dir, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert_refused(run_command("extract_layers", "--model_name", broken, "--output_dir", out), "model.safetensors")
    tensors = load_file(donor_dir / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, weights)
    result = run_command("extract_layers", "--model_name", broken, "--output_dir", out)
    assert_refused(result, "lacks model.layers.2.mlp.up_proj.weight")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, weights)
    result = run_command("extract_layers", "--model_name", broken, "--output_dir", out)
    assert_refused(result, "has shape [3, 3]", "asks for [40, 32]")
    (broken / "config.json").write_text('{"model_type": "bert"}')
    result = run_command("extract_layers", "--model_name", broken, "--output_dir", out)
    assert_refused(result, "is a bert model")
    (broken / "config.json").write_text("{")
    result = run_command("extract_layers", "--model_name", broken, "--output_dir", out)
    assert_refused(result, "config.json")
    assert not out.exists()


def test_help_comes_before_torch():
    """--help must not wait for the heavy imports, which take seconds."""
    result = run_fresh_command("extract_layers", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "--output_dir" in result.stdout
    assert "examples:" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "lm_eval", "modelscope", "huggingface_hub"}
