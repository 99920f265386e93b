"""Folders that people take for models. Every command says what such a folder is, and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model_preparation import build_checkpoint, extract_layers, load_checkpoint
from model_preparation.checkpoint.checkpoint_info import read_info
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import find_model
from model_preparation.hub.sources import resolve, target_named
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from tests.conftest import assert_refused, run_command

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064d}\nsize 4976698672\n".encode()
PAGE = b"\n<!DOCTYPE html><html><body>Access is restricted</body></html>"
WEIGHTS = "model.safetensors"


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    """Puts `content` in the place of a model's file."""
    return lambda folder: (folder / name).write_bytes(content) and None


def renamed(name: str) -> Callable[[Path], None]:
    """Gives the weights another name."""
    return lambda folder: (folder / WEIGHTS).rename(folder / name) and None


def only(**files: bytes | str) -> Callable[[Path], None]:
    """Leaves nothing but `files`; two underscores in a name are a dot."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder)
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        folder.mkdir(exist_ok=True)

    return make


def linked(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../blobs/0123")


def deeper(folder: Path) -> None:
    inner = folder.with_name("inner")
    folder.rename(inner)
    folder.mkdir()
    inner.rename(folder / "Llama-3.1-8B")


def modelscope_temp(folder: Path) -> None:
    (folder / "._____temp").mkdir()
    (folder / WEIGHTS).rename(folder / "._____temp" / WEIGHTS)


def hub_download(folder: Path) -> None:
    place = folder / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    (folder / WEIGHTS).rename(place / "xyz.incomplete")


KINDS = {
    "pointer": (replaced(WEIGHTS, POINTER), r"model\.safetensors is a Git LFS pointer.* Run `git lfs pull`"),
    "config's pointer": (replaced("config.json", POINTER), r"config\.json is a Git LFS pointer"),
    "tokenizer's pointer": (replaced("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "web page": (replaced(WEIGHTS, PAGE), r"model\.safetensors is a web page .*Log in or give a token"),
    "config's page": (replaced("config.json", PAGE), r"config\.json is a web page"),
    "server's answer": (replaced(WEIGHTS, b"<?xml version='1.0'?><Error/>"), "is a web page"),
    "refusal": (replaced(WEIGHTS, b"Access to model org/x is\n restricted"), "is text and begins 'Access to model"),
    "zeros": (replaced(WEIGHTS, bytes(4096)), "begins with zeros"),
    "renamed GGUF": (replaced(WEIGHTS, b"GGUF\3\0\0\0" + bytes(100)), "is a GGUF file"),
    "aria2": (replaced(f"{WEIGHTS}.aria2", b"\0\1"), r"unfinished download: model\.safetensors\.aria2"),
    "incomplete": (renamed(f"{WEIGHTS}.incomplete"), "holds an unfinished download.*the same command continues"),
    "part": (renamed(f"{WEIGHTS}.part"), "holds an unfinished download"),
    "browser's": (renamed(f"{WEIGHTS}.crdownload"), "holds an unfinished download"),
    "modelscope's": (modelscope_temp, r"holds an unfinished download \(\._____temp\)"),
    "huggingface's": (hub_download, r"holds an unfinished download \(xyz\.incomplete\)"),
    "link to nothing": (linked, r"model\.safetensors is a link to \.\./blobs/0123, which is not there\. .*cp -rL"),
    "GGUF": (renamed("model-Q4_K_M.gguf"), r"holds a GGUF file.*model-Q4_K_M\.gguf.*the model it was made from"),
    "Meta's": (
        only(params__json="{}", consolidated__00__pth=b"PK\3\4"),
        "maker's original format.*convert_llama_weights",
    ),
    "adapter": (only(adapter_config__json='{"peft_type": "LORA"}'), "holds an adapter.*merge_and_unload"),
    "ONNX": (only(config__json="{}", model__onnx=b"\x08"), "weights for ONNX"),
    "FSDP": (only(__distcp=b"PK\3\4", __0_0__distcp=b"PK\3\4"), "shards of a training run.*accelerate merge-weights"),
    "state": (only(optimizer__pt=b"PK\3\4", trainer_state__json="{}"), "holds states of a training run"),
    "data": (only(train__parquet=b"PAR1"), "holds a data set"),
    "empty": (only(), "is an empty folder"),
    "deeper": (deeper, r"holds no model or checkpoint itself, but its subfolders do\. Give .*/model/Llama-3\.1-8B$"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_told_by_what_it_is(kind, donor_dir, tmp_path):
    make, words = KINDS[kind]
    folder = Path(shutil.copytree(donor_dir, tmp_path / "model"))
    make(folder)
    with pytest.raises(SurgeryError, match=words):
        extract_layers(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if kind not in ("config's pointer", "config's page", "tokenizer's pointer", "pointer", "web page", "zeros"):
        return
    with pytest.raises(SurgeryError, match=r"pointer|page|zeros"):
        find_model(folder).load("cpu", None, parallelize=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("aria2",)])
def test_what_is_no_checkpoint_is_told_by_what_it_is(kind, donor_dir, tmp_path):
    make, words = KINDS[kind]
    folder = Path(shutil.copytree(donor_dir, tmp_path / "model"))
    make(folder)
    with pytest.raises(SurgeryError, match=words):
        read_info(folder)


def test_archives_and_single_files_are_told(donor_dir, tmp_path):
    for name, words in (
        ("model.tar.gz", "is an archive. Unpack it"),
        ("model.Q4_K_M.gguf", "is a GGUF file"),
        ("model.safetensors", "is a file. Give the path of a folder"),
    ):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(SurgeryError, match=words):
            resolve(str(tmp_path / name))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(SurgeryError, match=r"link is a link to .*/gone, which is not there"):
        resolve(str(tmp_path / "link"))


@pytest.mark.parametrize(
    ("root", "revisions", "ref", "taken"),
    [
        ("models--org--name", ["0123", "4567"], "0123", "0123"),
        ("models--org--name", ["0123"], None, "0123"),
        ("models--org--name", ["0123"], "4567", "0123"),
        ("models/org--name", ["master", "v1"], None, "master"),
        ("models--org--name", ["0123", "4567"], None, None),
        ("models--org--name", ["0123", "4567"], "../0123", None),
    ],
)
def test_the_snapshot_in_a_hubs_cache_is_taken(root, revisions, ref, taken, donor_dir, layers_dir, tmp_path):
    cache = tmp_path / root
    for revision in revisions:
        shutil.copytree(donor_dir, cache / "snapshots" / revision)
    if ref:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(f"{ref}\n")
    if taken is None:
        with pytest.raises(SurgeryError, match=r"but its subfolders do. Give .*/snapshots/0123 or .*/snapshots/4567"):
            resolve(str(cache))
        return
    snapshot = cache / "snapshots" / taken
    for given in (cache, cache / "snapshots"):
        assert resolve(str(given)).folder == resolve(str(given), need="tokenizer").folder == snapshot
        assert target_named("llama", {"llama": str(given)}) == str(snapshot)
        assert find_model(given).folder == snapshot
    with pytest.raises(SurgeryError, match=f"is a hub's cache. Give the snapshot in it: {snapshot}"):
        read_info(cache)
    with pytest.raises(SurgeryError, match="holds no model or checkpoint itself, but its subfolders do"):
        resolve(str(tmp_path))


def test_a_cache_that_was_not_filled_is_told(donor_dir, tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = Path(shutil.copytree(donor_dir, cache / "snapshots" / "0123"))
    (cache / "blobs").mkdir()
    (snapshot / WEIGHTS).rename(cache / "blobs" / "abc.incomplete")
    with pytest.raises(SurgeryError, match=r"snapshots/0123 holds an unfinished download \(abc\.incomplete\)"):
        resolve(str(cache))


def test_pieces_of_a_model_are_still_named_as_missing(donor_dir, tmp_path):
    """What lies beside a model is not taken for the reason why a shard is missing."""
    folder = Path(shutil.copytree(donor_dir, tmp_path / "model"))
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    for name in ("model.gguf", "adapter_config.json", "train.parquet", "consolidated.00.pth", "optimizer.pt"):
        (folder / name).write_bytes(b"PK\3\4")
    with pytest.raises(SurgeryError, match=r"lacks model-1\.safetensors"):
        resolve(str(folder))


def test_a_tokenizer_may_lie_beside_weights_that_were_not_cloned(donor_dir, tmp_path):
    folder = Path(shutil.copytree(donor_dir, tmp_path / "clone"))
    (folder / WEIGHTS).write_bytes(POINTER)
    assert load_tokenizer(resolve(str(folder), need="tokenizer").folder)("a").input_ids


def test_a_checkpoint_cloned_without_its_large_files(checkpoint_dir, layers_dir, base_dir, tmp_path):
    folder = Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))
    for path in folder.glob("*.pt"):
        path.write_bytes(POINTER)
    with pytest.raises(SurgeryError, match=r"model_state_dict\.pt is a Git LFS pointer"):
        load_checkpoint(folder)
    result = run_command("verify_checkpoint", folder)
    assert_refused(result, "faults in")
    for name in ("model.pt", "model_state_dict.pt"):
        assert f"{name} is a Git LFS pointer" in " ".join(result.stdout.split())
    share = ("--repo", "org/x", "--license", "mit", "--dry_run")
    assert_refused(run_command("share_checkpoint", "--checkpoint", folder, *share), "is a Git LFS pointer")
    layers = Path(shutil.copytree(layers_dir, tmp_path / "layers"))
    (layers / "layer_01.pt").write_bytes(POINTER)
    with pytest.raises(SurgeryError, match=r"layer_01\.pt is a Git LFS pointer"):
        build_checkpoint(str(base_dir), [1], layers, tmp_path / "out")
    (layers / "metadata.json").write_bytes(PAGE)
    with pytest.raises(SurgeryError, match=r"metadata\.json is a web page"):
        LayerStore(layers)
    for path in folder.glob("*.pt"):
        path.unlink()
        path.symlink_to("../gone")
    with pytest.raises(SurgeryError, match=r"model\.pt is a link to \.\./gone, which is not there"):
        load_checkpoint(folder)


def test_every_command_tells_it(donor_dir, base_dir, layers_dir, checkpoint_dir, tmp_path):
    donor, base = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (donor_dir, base_dir))
    (donor / WEIGHTS).write_bytes(POINTER)
    (base / "pytorch_model.bin").write_bytes(POINTER)
    out = ("--output_dir", tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 50)
    commands = (
        ("extract_layers", "--model_name", donor, *out),
        ("init_llamba_base", "--donor", donor, *out),
        ("distill_llamba_base", "--donor", donor, *out, "--data", text),
        ("create_replaced_model_checkpoint", "--base", base, "--llama_layers_dir", layers_dir, "--layers", 1, *out),
        (
            "create_replaced_model_checkpoint",
            "--base",
            base_dir,
            "--llama_layers_dir",
            donor.parent,
            "--layers",
            1,
            *out,
        ),
        ("heal_checkpoint", "--checkpoint", donor, "--data", text, *out),
        ("test_checkpoint", "--checkpoint", donor),
        ("test_checkpoint", "--checkpoint", checkpoint_dir, "--compare_with", donor, "--max_new_tokens", 1),
        ("inspect_checkpoint", donor),
        ("verify_checkpoint", donor),
        ("verify_checkpoint", checkpoint_dir, "--base", base),
        ("share_checkpoint", "--checkpoint", donor, "--repo", "org/x", "--license", "mit", "--dry_run"),
    )
    for name, *args in commands:
        result = run_command(name, *args)
        told = result.stdout + result.stderr
        assert "Traceback" not in told, (name, args, told)
        assert "Git LFS pointer" in told or "but its subfolders do" in told, (name, args, told)
    assert not (tmp_path / "out").exists()
