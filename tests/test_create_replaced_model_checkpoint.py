"""create_replaced_model_checkpoint.py: what it writes, what it refuses, and that it leaves nothing half done."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from model_preparation import build_checkpoint, extract_layers, load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import (
    HANG_SECONDS,
    PACKAGE,
    VOCABULARY,
    assert_refused,
    make_tokenizer,
    run_command,
    seeded,
    tiny_config,
    wait_until,
)


def build(base, layers_dir, out, *args, layers=(1, 3), **kwargs):
    return run_command(
        "create_replaced_model_checkpoint",
        *("--base", base, "--llama_layers_dir", layers_dir, "--output_dir", out, "--layers", *layers, *args),
        **kwargs,
    )


def test_the_command_writes_the_folder_of_the_guide(base_dir, layers_dir, tmp_path):
    out = tmp_path / "deep" / "llamba_replaced_1_3"
    result = build(base_dir, layers_dir, out, "--description", "两层", "--score", "0.57", "--gpu", 0, layers=(3, 1))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Checkpoint is in {out}"
    assert "layer_03.pt" in result.stdout  # the plan says which layer comes from where
    if not torch.cuda.is_available():
        assert "Device       cpu (torch sees no CUDA device)" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "model.pt",
        "model_state_dict.pt",
        "tokenizer",
        "checkpoint_info.json",
        "tensor_digests.json",
        "README.txt",
    }
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    info = json.loads((out / "checkpoint_info.json").read_text())
    assert info["replaced_layers"] == [1, 3]
    assert (info["num_replaced_layers"], info["total_layers"]) == (2, 4)
    assert (info["num_heads"], info["head_dim"]) == (2, 16)
    assert (info["description"], info["mmlu_score"], info["dtype"]) == ("两层", 0.57, "float32")
    assert info["base_model"]["id"] == base_dir.name
    assert info["creation_time"].startswith("20")
    assert "两层" in (out / "README.txt").read_text()


def test_every_file_is_recorded_with_its_size_and_digest(checkpoint_dir, base_dir, layers_dir):
    info = json.loads((checkpoint_dir / "checkpoint_info.json").read_text())
    files = {path.relative_to(checkpoint_dir).as_posix(): path for path in checkpoint_dir.rglob("*") if path.is_file()}
    assert info["files"].keys() == files.keys() - {"checkpoint_info.json"}
    for name, entry in info["files"].items():
        data = files[name].read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    weights = info["base_model"]["files"]["pytorch_model.bin"]
    assert weights["blake3"] == blake3((base_dir / "pytorch_model.bin").read_bytes()).hexdigest()
    layer = info["replacement_source"]["layers"]["3"]
    assert layer == hashlib.sha256((layers_dir / "layer_03.pt").read_bytes()).hexdigest()


def test_grafted_layers_are_the_donors_and_the_others_the_bases(checkpoint_dir, base_dir, donor_dir):
    state = torch.load(checkpoint_dir / "model_state_dict.pt")
    base = torch.load(base_dir / "pytorch_model.bin")
    donor = load_file(donor_dir / "model.safetensors")
    for name, tensor in state.items():
        layer = name.split(".")[2] if name.startswith("backbone.layers.") else None
        if layer in ("1", "3"):
            assert torch.equal(tensor, donor[name.replace("backbone.", "model.")]), name
        else:
            assert torch.equal(tensor, base[name]), name
    assert len(state) == 3 + 2 * 9 + 2 * 11


def test_all_layers_grafted_computes_the_donor(donor_dir, layers_dir, tmp_path):
    """With the donor's embedding, norm and head around them, the donor's layers give the donor's logits."""
    donor = LlamaForCausalLM.from_pretrained(donor_dir)
    base = tmp_path / "base"
    model = LlambaForCausalLM(tiny_config(norm_epsilon=donor.config.rms_norm_eps, pad_vocab_size_multiple=1))
    with torch.no_grad():
        model.backbone.embedding.weight.copy_(donor.model.embed_tokens.weight)
        model.backbone.final_layernorm.weight.copy_(donor.model.norm.weight)
        model.lm_head.weight.copy_(donor.lm_head.weight)
    model.save_pretrained(base)
    assert build(base, layers_dir, tmp_path / "out", layers=range(4)).returncode == 0
    grafted, _ = load_checkpoint(tmp_path / "out")
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = donor(ids).logits
        assert ((grafted(ids).logits - wanted).abs().max() / wanted.std()).item() < 1e-5
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = {"inputs": ids[:, :9], "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert torch.equal(grafted.generate(**prompt, **greedy), donor.generate(**prompt, **greedy))


def test_dtype_and_tokenizer_options(base_dir, layers_dir, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(tmp_path / "mine")
    result = build(base_dir, layers_dir, tmp_path / "out", "--dtype", "bfloat16", "--tokenizer", tmp_path / "mine")
    assert result.returncode == 0, result.stderr
    assert "the base cast from float32" in result.stdout
    model, tokenizer = load_checkpoint(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "<mine>" in tokenizer.get_vocab()
    tokenizer.add_tokens([f"<mine {number}>" for number in range(4)])  # 265 tokens for 264 embeddings
    tokenizer.save_pretrained(tmp_path / "large")
    result = build(base_dir, layers_dir, tmp_path / "refused", "--tokenizer", tmp_path / "large")
    assert_refused(result, "large has 265 tokens, but the model has only 264. Give the model's own")


def test_special_tokens_come_from_the_donor_where_the_base_names_none(checkpoint_dir):
    model, _ = load_checkpoint(checkpoint_dir)
    assert model.generation_config.eos_token_id == 257
    assert model.generation_config.pad_token_id == load_checkpoint(checkpoint_dir)[1].pad_token_id


def test_dry_run_writes_nothing(base_dir, layers_dir, tmp_path):
    result = build(base_dir, layers_dir, tmp_path / "out", "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "To write" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "code", "words"),
    [
        ([4], 1, ["Layer 4 is out of range", "layers 0 to 3"]),
        ([-1], 2, ["-1 is negative"]),
        ([2, 2], 2, ["layer 2 is given more than once"]),
        (["x"], 2, ["'x' is not a layer index"]),
        (["2:1"], 2, ["names heads of layer 2; write --heads 2:1"]),
        (["1.5"], 2, ["'1.5' is not a layer index"]),
        ([], 2, ["expected at least one argument"]),
    ],
)
def test_bad_layers(base_dir, layers_dir, tmp_path, layers, code, words):
    assert_refused(build(base_dir, layers_dir, tmp_path / "out", layers=layers), *words, code=code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--score", "57"], 2, ["'57' is not between 0 and 1"]),
        (["--gpu", "0", "--device", "cpu"], 2, ["not allowed with"]),
        (["--device", "warp"], 1, ["--device warp cannot be used here: torch knows no such device. Use --device cpu."]),
        (["--device", "warp", "--dry_run"], 1, ["--device warp cannot be used here"]),
        (["--device", "xla"], 1, ["--device xla cannot be used here: ", ". Use --device cpu."]),
        (["--device", "meta"], 1, ["--device meta cannot be used here: it holds no numbers. Use --device cpu."]),
        (["--gpu", "-3"], 2, ["-3 is too small"]),
        (["--description", "\udcff"], 2, ["'\\udcff' is not UTF-8"]),
        (["--dtype", "int8"], 2, ["invalid choice"]),
        (["--base", "/no/such/folder"], 1, ["/no/such/folder is not there"]),
        (["--tokenizer", "/no/such/folder"], 1, ["/no/such/folder is not there"]),
    ],
)
def test_bad_options(base_dir, layers_dir, tmp_path, args, code, words):
    result = build(base_dir, layers_dir, tmp_path / "out", *args)
    assert_refused(result, *words, code=code)
    assert code == 2 or len(result.stderr) < 200
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.partial", "x.partial-host-7", "link"])
def test_places_that_are_no_place_for_a_checkpoint(base_dir, layers_dir, tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    words = "is a link that leads nowhere" if name == "link" else "has the name of an unfinished folder"
    assert_refused(build(base_dir, layers_dir, tmp_path / name), name, words)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_the_python_functions_are_given_is_checked_too(base_dir, layers_dir, checkpoint_dir, tmp_path):
    out = tmp_path / "out"
    for layers, options, words in (
        ([1], {"score": float("nan")}, "score nan is not between 0 and 1"),
        ([1], {"score": 57}, "score 57 is not between 0 and 1"),
        ([1], {"dtype": "int8"}, "No model can have the dtype 'int8'"),
        ([1], {"dtype": "save"}, "No model can have the dtype 'save'"),
        ([1], {"device": "meta"}, "it holds no numbers"),
        (["1"], {}, "are no indices of layers"),
        ([1.0], {}, "are no indices of layers"),
        ([], {}, "No layer is given"),
        ([1, 1], {}, "given more than once"),
    ):
        with pytest.raises(SurgeryError, match=words):
            build_checkpoint(str(base_dir), layers, layers_dir, out, **options)
    with pytest.raises(SurgeryError, match="No layer is given"):
        extract_layers("tiny_llama", out, layers=[])
    assert not list(tmp_path.iterdir())
    info = build_checkpoint(str(base_dir), np.array([3, 1]), layers_dir, out, dtype="bfloat16")
    assert (info["replaced_layers"], info["dtype"]) == ([1, 3], "bfloat16")
    assert load_checkpoint(out, dtype="float32")[0].dtype == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(SurgeryError, match="cuda cannot be used here"):
            load_checkpoint(out, device="cuda")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", ["Layer file not found", "layer_03.pt", "extract_layers.py"]),
        ("cut", ["layer_03.pt is", "bytes long instead of"]),
        ("flipped", ["layer_03.pt is changed", "SHA-256"]),
        ("no metadata", ["metadata.json is missing", "extract_layers.py", "--from_legacy"]),
        ("newer", ["format version 99", "knows 1"]),
        ("not json", ["metadata.json is not metadata"]),
        ("no config", ["metadata.json is damaged"]),
    ],
)
def test_bad_layer_folders(base_dir, layers_dir, tmp_path, damage, words):
    folder = Path(shutil.copytree(layers_dir, tmp_path / "layers"))
    layer, metadata = folder / "layer_03.pt", folder / "metadata.json"
    fields = json.loads(metadata.read_text())
    data = bytearray(layer.read_bytes())
    if damage == "missing":
        layer.unlink()
    elif damage == "cut":
        layer.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        layer.write_bytes(data)
    elif damage == "no metadata":
        metadata.unlink()
    elif damage == "newer":
        metadata.write_text(json.dumps({**fields, "format_version": 99}))
    elif damage == "not json":
        metadata.write_text("{")
    elif damage == "no config":
        metadata.write_text(json.dumps({name: value for name, value in fields.items() if name != "config"}))
    assert_refused(build(base_dir, folder, tmp_path / "out"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, ["width (hidden_size) is 64, the base's is 32"]),
        ({"vocab_size": 300}, ["vocabulary size is 300, the base's is 260"]),
        ({"num_hidden_layers": 5}, ["layers is 5, the base's is 4"]),
    ],
)
def test_donors_that_do_not_fit(base_dir, tmp_path, changes, words):
    layers = layers_of_another_donor(tmp_path, **changes)
    assert_refused(build(base_dir, layers, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_grafted_layer_brings_its_own_heads(base_dir, tmp_path):
    layers = layers_of_another_donor(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    result = build(base_dir, layers, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "Heads        4 of width 8 in grafted layers, 2 of width 16 in kept ones" in result.stdout
    model, _ = load_checkpoint(tmp_path / "out")
    donor = LlamaForCausalLM.from_pretrained(tmp_path / "donor")
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = {
            "position_embeddings": donor.model.rotary_emb(hidden, torch.arange(9)[None]),
            "attention_mask": torch.full((9, 9), -1e9).triu(1)[None, None],
        }
        torch.testing.assert_close(model.backbone.layers[3](hidden, **given), donor.model.layers[3](hidden, **given))
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    refused = build(base_dir, layers, tmp_path / "again", "--allow_other_heads")
    assert_refused(refused, "unrecognized arguments: --allow_other_heads", code=2)


def layers_of_another_donor(tmp_path: Path, **changes: int) -> Path:
    """The extracted layers of a Llama like the tiny donor, with `changes` in its config."""
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(**{**fields, "num_key_value_heads": 1, "intermediate_size": 40, **changes})
    donor, layers = tmp_path / "donor", tmp_path / "layers"
    LlamaForCausalLM(config).save_pretrained(donor)
    make_tokenizer().save_pretrained(donor)
    extract_layers(str(donor), layers)
    return layers


def test_the_hint_to_extract_layers_names_the_donor_of_the_base(base_dir, tmp_path):
    missing = tmp_path / "layers"
    for base, donor in (
        ("tiny_llamba", "tiny_llama"),
        ("unaligned_llamba", "llama"),
        (base_dir, "DONOR"),
        ("huggingface:org/other", "DONOR"),
    ):
        words = f"Extract the donor's layers first: python extract_layers.py --model_name {donor} --output_dir"
        assert_refused(build(base, missing, tmp_path / "out"), words)
    # A wrong base is reported before missing layers.
    assert_refused(build("tiny_lamba", missing, tmp_path / "out"), "'tiny_lamba' is neither one of the names")
    assert_refused(build(tmp_path / "no", missing, tmp_path / "out"), "/no is not there")
    assert not list(tmp_path.iterdir())


def test_bases_that_do_not_fit(base_dir, donor_dir, layers_dir, checkpoint_dir, tmp_path):
    out = tmp_path / "out"
    assert_refused(build(donor_dir, layers_dir, out), "is a llama model", "must be a Llamba")
    grafted = tmp_path / "grafted"
    load_checkpoint(checkpoint_dir)[0].save_pretrained(grafted)
    assert_refused(build(grafted, layers_dir, out), "grafted layers already")
    again = f"extract_layers.py --model_name {donor_dir} --output_dir"
    assert_refused(build(base_dir, donor_dir, out), f"{donor_dir} is a model's folder", again)
    broken = Path(shutil.copytree(base_dir, tmp_path / "broken"))
    state = torch.load(base_dir / "pytorch_model.bin")
    torch.save({**state, "extra.weight": torch.ones(1)}, broken / "pytorch_model.bin")
    assert_refused(build(broken, layers_dir, out), "holds extra.weight")
    torch.save({n: t for n, t in state.items() if n != "backbone.layers.0.mixer.D"}, broken / "pytorch_model.bin")
    assert_refused(build(broken, layers_dir, out), "lacks backbone.layers.0.mixer.D")
    torch.save({**state, "lm_head.weight": torch.ones(3, 3)}, broken / "pytorch_model.bin")
    assert_refused(build(broken, layers_dir, out), "lm_head.weight", "shape [3, 3]", "asks for [264, 32]")
    torch.save({**state, "lm_head.weight": state["lm_head.weight"].to(torch.int8)}, broken / "pytorch_model.bin")
    assert_refused(build(broken, layers_dir, out), "holds int8 numbers. Give the unquantised model")
    (broken / "pytorch_model.bin").write_bytes(b"not a zip file")
    assert_refused(build(broken, layers_dir, out), "pytorch_model.bin cannot be read as tensors")
    torch.save({**state, "lm_head.weight": state["lm_head.weight"] * torch.nan}, broken / "pytorch_model.bin")
    assert_refused(build(broken, layers_dir, out), "not finite")
    (broken / "config.json").write_text(json.dumps({"model_type": "llamba", "ssm_cfg": {"state": 3}}))
    assert_refused(build(broken, layers_dir, out), "ssm_cfg has unknown fields state")
    assert not out.exists()


def test_no_tokenizer_anywhere(base_dir, layers_dir, tmp_path):
    folder = Path(shutil.copytree(layers_dir, tmp_path / "layers"))
    shutil.rmtree(folder / "tokenizer")
    assert_refused(build(base_dir, folder, tmp_path / "out"), "--tokenizer")


def test_an_existing_checkpoint_is_replaced_only_when_asked(base_dir, layers_dir, tmp_path):
    out = tmp_path / "out"
    assert build(base_dir, layers_dir, out).returncode == 0
    before = (out / "checkpoint_info.json").read_bytes()
    assert_refused(build(base_dir, layers_dir, out, layers=[0]), "exists already", "--overwrite")
    assert (out / "checkpoint_info.json").read_bytes() == before
    assert build(base_dir, layers_dir, out, "--overwrite", layers=[0]).returncode == 0
    assert json.loads((out / "checkpoint_info.json").read_text())["replaced_layers"] == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_targets(base_dir, layers_dir, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert_refused(build(base_dir, layers_dir, file), "is a file")
    assert_refused(build(base_dir, layers_dir, file / "below"), "not a folder you can write to")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert_refused(build(base_dir, layers_dir, other, "--overwrite"), "holds other files (notes.txt)")
    assert (other / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_target_not_writable(base_dir, layers_dir, tmp_path):
    tmp_path.chmod(0o500)
    assert_refused(build(base_dir, layers_dir, tmp_path / "out"), "not a folder you can write to")


def test_target_on_a_read_only_file_system(base_dir, layers_dir):
    assert_refused(build(base_dir, layers_dir, "/proc/out"), "/proc")


def test_disk_too_small(base_dir, layers_dir, tmp_path, monkeypatch):
    """The build asks the file system for its free space before it writes anything."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    assert_refused(build(base_dir, layers_dir, tmp_path / "out"), "only 50.0 MB are free")
    assert not list(tmp_path.iterdir())


def test_disk_full_while_writing(base_dir, layers_dir, quick_python, tmp_path):
    """A limit on file sizes stands in for a disk that fills up in the middle."""
    script = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base_dir, "--llama_layers_dir", layers_dir]
    result = subprocess.run(
        [quick_python, "-c", script, *command, "--layers", "1", "--output_dir", tmp_path / "new" / "out"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert_refused(result, "error: File too large (", "model.pt).")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_writing(base_dir, layers_dir, quick_python, tmp_path, sent, code):
    old = tmp_path / "out"
    build_checkpoint(str(base_dir), [0], layers_dir, old)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    process = start_slow_build(quick_python, base_dir, layers_dir, old)
    wait_for_partial(process, old)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_interrupt_lost_inside_a_destructor_still_stops_the_build(base_dir, layers_dir, quick_python, tmp_path):
    """Python drops what a signal handler raises inside __del__. The build must still end as interrupted."""
    script = (
        "import os, runpy, signal, sys\n"
        "from model_preparation.checkpoint import checkpoint_folder\n"
        "class Destroyed:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "with_checksum = checkpoint_folder.with_checksum\n"
        "checkpoint_folder.with_checksum = lambda info: (Destroyed(), with_checksum(info))[1]\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base_dir, "--llama_layers_dir", layers_dir]
    result = subprocess.run(
        [quick_python, "-c", script, *command, "--layers", "1", "--output_dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 130, result.stderr
    assert "error: interrupted." in result.stderr
    assert not list(tmp_path.iterdir())


def test_killed_while_writing(base_dir, layers_dir, quick_python, tmp_path):
    out = tmp_path / "out"
    process = start_slow_build(quick_python, base_dir, layers_dir, out)
    wait_for_partial(process, out)
    process.kill()
    process.communicate()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert build(base_dir, layers_dir, out).returncode == 0  # the next build clears what the killed one left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def start_slow_build(python, base_dir, layers_dir, out) -> subprocess.Popen:
    """A build that sleeps for 15 minutes before it syncs a .pt file."""
    script = (
        "import os, runpy, sys, time\n"
        "fsync = os.fsync\n"
        "def slow_fsync(descriptor):\n"
        "    if os.readlink(f'/proc/self/fd/{descriptor}').endswith('.pt'):\n"
        "        time.sleep(900)\n"
        "    fsync(descriptor)\n"
        "os.fsync = slow_fsync\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base_dir, "--llama_layers_dir", layers_dir]
    return subprocess.Popen(
        [python, "-c", script, *command, "--layers", "1", "--output_dir", out, "--overwrite"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_partial(process: subprocess.Popen, out: Path) -> None:
    written = out.with_name(f"{out.name}.partial") / "new" / "model.pt"
    wait_until(written.exists, alive=lambda: process.poll() is None)


def test_the_files_hold_what_torch_save_writes(checkpoint_dir, tmp_path):
    """The zip files have torch.save's names and tensors, and right CRCs. No tensor was loaded for them.

    The pickles are not compared: a module loaded and pickled again may share its strings differently,
    and may number its tensors in another order.
    """
    for name in ("model.pt", "model_state_dict.pt"):
        torch.save(torch.load(checkpoint_dir / name), tmp_path / name)
        archive, again = zipfile.ZipFile(checkpoint_dir / name), zipfile.ZipFile(tmp_path / name)
        assert archive.testzip() is None
        names = [[entry.partition("/")[2] for entry in opened.namelist()] for opened in (archive, again)]
        assert sorted(names[0]) == sorted(names[1])
        tensors = [
            sorted(opened.read(entry) for entry in opened.namelist() if "/data/" in entry)
            for opened in (archive, again)
        ]
        assert tensors[0] == tensors[1] != []


def test_two_builds_give_the_same_weights(base_dir, layers_dir, checkpoint_dir, tmp_path):
    build_checkpoint(str(base_dir), [1, 3], layers_dir, tmp_path / "out", description="a tiny pair")
    for name in ("model.pt", "model_state_dict.pt"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint_dir / name).read_bytes()


def test_a_tied_base_stays_tied(donor_dir, layers_dir, tmp_path):
    model = seeded(LlambaForCausalLM(tiny_config(tie_embeddings=True)))
    model.save_pretrained(tmp_path / "base")
    build_checkpoint(str(tmp_path / "base"), [2], layers_dir, tmp_path / "out")
    for again in (load_checkpoint(tmp_path / "out")[0], torch.load(tmp_path / "out" / "model.pt")):
        assert again.lm_head.weight is again.backbone.embedding.weight
