"""Checkpoints of one base on a disk that shares extents: they take the room of one, and of what was grafted."""

import json
import os
import subprocess

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model_preparation import SurgeryError, build_checkpoint, extract_layers, verify_checkpoint
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import VOCABULARY, make_tokenizer, seeded, tiny_config

WIDTH = 192


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and a donor's layers, so large that the room for folders hardly counts beside them."""
    folder = tmp_path_factory.mktemp("pair")
    ssm = {"d_state": 16, "n_v_heads": 4, "n_qk_heads": 4, "chunk_size": 8}
    base = LlambaForCausalLM(tiny_config(d_model=WIDTH, ssm_cfg=ssm, mlp_cfg={"intermediate_size": 768}))
    seeded(base, scale=0.05).save_pretrained(folder / "base")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=4, intermediate_size=768, **heads)
    seeded(LlamaForCausalLM(config), seed=1, scale=0.05).save_pretrained(folder / "donor")
    make_tokenizer().save_pretrained(folder / "donor")
    extract_layers(str(folder / "donor"), folder / "layers")
    return folder / "base", folder / "layers"


def used_bytes(disk) -> int:
    subprocess.run(["sync", "-f", disk], check=True)
    stat = os.statvfs(disk)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def test_checkpoints_take_the_room_of_one_and_their_deltas(pair, sharing_disk):
    base, layers_dir = pair
    combinations = ([0], [1], [2], [3], [1, 3])
    before = used_bytes(sharing_disk)
    logical_bytes = delta_bytes = weight_bytes = 0
    for layers in combinations:
        out = sharing_disk / "_".join(map(str, layers))
        info = build_checkpoint(str(base), layers, layers_dir, out)
        logical_bytes += info["files"]["model.pt"]["bytes"] + info["files"]["model_state_dict.pt"]["bytes"]
        weight_bytes = max(weight_bytes, 4 * info["parameters"])
        delta_bytes += sum(os.path.getsize(layers_dir / f"layer_{layer:02d}.pt") for layer in layers)
    taken_bytes = used_bytes(sharing_disk) - before
    slack_bytes = 5 * 500_000  # tokenizers, pickles, gaps, the last part of each tensor; file system tables
    assert taken_bytes < weight_bytes + delta_bytes + slack_bytes
    assert taken_bytes < 0.4 * logical_bytes
    for layers in (combinations[0], combinations[-1]):
        assert verify_checkpoint(sharing_disk / "_".join(map(str, layers)), str(base), layers_dir) == []


def test_the_two_files_share_and_each_can_be_changed_alone(pair, sharing_disk):
    base, layers_dir = pair
    before = used_bytes(sharing_disk)
    info = build_checkpoint(str(base), [1], layers_dir, sharing_disk / "out")
    assert used_bytes(sharing_disk) - before < 1.3 * 4 * info["parameters"]
    whole = (sharing_disk / "out" / "model.pt").read_bytes()
    state = sharing_disk / "out" / "model_state_dict.pt"
    state.write_bytes(bytes(state.stat().st_size))
    assert (sharing_disk / "out" / "model.pt").read_bytes() == whole
    assert torch.load(sharing_disk / "out" / "model.pt").config.llama_layers == [1]


def test_the_same_bytes_as_on_a_disk_that_cannot(pair, sharing_disk, tmp_path, monkeypatch):
    base, layers_dir = pair
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    build_checkpoint(str(base), [0], layers_dir, sharing_disk / "sibling")
    build_checkpoint(str(base), [2], layers_dir, sharing_disk / "out")
    build_checkpoint(str(base), [2], layers_dir, tmp_path / "elsewhere" / "out")
    for name in ("model.pt", "model_state_dict.pt", "checkpoint_info.json", "tensor_digests.json"):
        assert (sharing_disk / "out" / name).read_bytes() == (tmp_path / "elsewhere" / "out" / name).read_bytes()


def test_a_damaged_sibling_is_named_and_nothing_is_left(pair, sharing_disk):
    base, layers_dir = pair
    info = build_checkpoint(str(base), [0], layers_dir, sharing_disk / "sibling")
    path = sharing_disk / "sibling" / "model_state_dict.pt"
    with path.open("r+b") as file:
        file.seek(info["parameters"] * 4 - 1000)  # in the head, the largest of the last tensors
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SurgeryError, match=r"sibling/model_state_dict\.pt is damaged: lm_head\.weight"):
        build_checkpoint(str(base), [1], layers_dir, sharing_disk / "out")
    assert [path.name for path in sharing_disk.iterdir()] == ["sibling"]


def test_what_cannot_be_read_or_is_of_another_base_is_passed_over(pair, sharing_disk, base_dir):
    base, layers_dir = pair
    for name in ("other", "cut", "odd"):
        build_checkpoint(str(base), [0], layers_dir, sharing_disk / name)
    info = json.loads((sharing_disk / "other" / "checkpoint_info.json").read_text())
    info["base_model"]["files"]["config.json"]["blake3"] = "0" * 64
    (sharing_disk / "other" / "checkpoint_info.json").write_text(json.dumps(info))
    (sharing_disk / "cut" / "tensor_digests.json").write_text("{")
    (sharing_disk / "odd" / "checkpoint_info.json").write_text("[]")
    build_checkpoint(str(base), [1], layers_dir, sharing_disk / "out")
    assert verify_checkpoint(sharing_disk / "out", str(base), layers_dir) == []
