"""inspect_checkpoint.py: what it shows of each kind of file, and what it refuses."""

import json

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from model_preparation import build_checkpoint
from model_preparation.checkpoint import inspect, tensor_statistics
from model_preparation.io.tensors.tensor_ranges import bytes_of
from tests.conftest import assert_refused, run_command


def shown(*args: object) -> list[dict]:
    result = run_command("inspect_checkpoint", *args, "--json")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_numbers_and_digests_are_those_of_the_tensors(checkpoint_dir):
    weights = torch.load(checkpoint_dir / "model_state_dict.pt")
    recorded = json.loads((checkpoint_dir / "tensor_digests.json").read_text())["tensors"]
    rows = shown(checkpoint_dir)
    assert [row["name"] for row in rows] == list(weights)
    for row in rows:
        tensor = weights[row["name"]].double()
        assert row["blake3"] == recorded[row["name"]]["blake3"]
        assert (row["dtype"], row["shape"]) == ("float32", list(tensor.shape))
        found = [row["mean"], row["std"], row["least"], row["most"]]
        wanted = [tensor.mean().item(), tensor.std(correction=0).item(), tensor.min().item(), tensor.max().item()]
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_every_kind_of_file_and_folder_is_read(checkpoint_dir, donor_dir, base_dir, layers_dir, tmp_path):
    build_checkpoint(str(base_dir), [1], layers_dir, tmp_path / "hf", format="hf")
    count = len(torch.load(checkpoint_dir / "model_state_dict.pt"))
    for path in (checkpoint_dir / "model.pt", checkpoint_dir / "model_state_dict.pt"):
        names = {row["name"] for row in shown(path)}
        assert len([name for name in names if not name.endswith("_inv_freq")]) >= count
    donor = {row["name"] for row in shown(donor_dir)}
    assert "model.layers.0.self_attn.q_proj.weight" in donor
    assert len(shown(base_dir / "pytorch_model.bin")) == len(shown(base_dir))
    assert any(row["name"].startswith("backbone.layers.1.self_attn.") for row in shown(tmp_path / "hf"))
    layers = shown(layers_dir, "--keys", "layer_02.pt:*")
    assert {row["name"].removeprefix("layer_02.pt:") for row in layers} == {
        row["name"] for row in shown(layers_dir / "layer_02.pt")
    }


def test_a_models_name_stands_for_its_folder(base_dir):
    assert shown("unaligned_llamba", "--source", f"unaligned_llamba={base_dir}") == shown(base_dir)
    result = run_command("inspect_checkpoint", "tiny_llama", "--diff", "embedded:tiny_llama")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(", 0 are not\n")
    assert_refused(run_command("inspect_checkpoint", "embedded:nothing"), "nothing", "tiny_llamba")


def test_plain_values_show_beside_tensors_and_what_is_not_finite_is_said(tmp_path):
    momentum = torch.tensor([1.0, float("nan"), -3.0])
    state = {
        "state": {0: {"step": torch.tensor(5.0), "exp_avg": momentum}},
        "groups": [{"lr": 0.5, "betas": (0.9, 0.99)}],
    }
    torch.save(state, tmp_path / "optimizer.pt")
    result = run_command("inspect_checkpoint", tmp_path / "optimizer.pt")
    lines = result.stdout.splitlines()
    assert "NOT FINITE: 1" in next(line for line in lines if line.startswith("state.0.exp_avg"))
    assert {"groups.0.lr = 0.5", "groups.0.betas = (0.9, 0.99)"} <= set(lines)
    assert lines[-1].startswith("2 tensors, 4 numbers, 16 bytes")


def test_diff_names_what_two_do_not_have_in_common(tmp_path):
    ours = {
        "same": torch.ones(3),
        "changed": torch.tensor([1.0, 2.0]),
        "cast": torch.ones(2),
        "shape": torch.ones(2),
        "a": torch.ones(1),
    }
    theirs = {
        **ours,
        "changed": torch.tensor([1.0, 4.0]),
        "cast": torch.ones(2).half(),
        "shape": torch.ones(3),
        "b": torch.ones(1),
    }
    del theirs["a"]
    save_file(ours, tmp_path / "ours.safetensors")
    torch.save(theirs, tmp_path / "theirs.pt")
    result = run_command("inspect_checkpoint", tmp_path / "ours.safetensors", "--diff", tmp_path / "theirs.pt")
    assert sorted(result.stdout.splitlines()) == sorted(
        [
            f"a  only in {tmp_path / 'ours.safetensors'}: float32 [1]",
            f"b  only in {tmp_path / 'theirs.pt'}: float32 [1]",
            "changed  differs: at most 2.000e+00, relative 4.851e-01",
            "cast  differs: at most 0.000e+00, relative 0.000e+00, torch.float32 against torch.float16",
            "shape  float32 [2] against float32 [3]",
            f"1 tensors are the same in {tmp_path / 'ours.safetensors'} and {tmp_path / 'theirs.pt'}, 5 are not",
        ]
    )


def test_diff_tells_numbers_that_are_not_finite_from_the_others(tmp_path):
    nan, inf = float("nan"), float("inf")
    ours = {
        "lost": torch.tensor([1.0, nan, 3.0]),
        "alike": torch.tensor([nan, inf, -inf, 1.0]),
        "signs": torch.tensor([inf, -inf, 2.0]),
    }
    theirs = {
        "lost": torch.tensor([1.0, 2.0, 99.0]),
        "alike": torch.tensor([nan, inf, -inf, 2.0]),
        "signs": torch.tensor([-inf, 1.0, 2.0]),
    }
    save_file(ours, tmp_path / "ours.safetensors")
    save_file(theirs, tmp_path / "theirs.safetensors")
    result = run_command("inspect_checkpoint", tmp_path / "ours.safetensors", "--diff", tmp_path / "theirs.safetensors")
    assert sorted(result.stdout.splitlines()[:-1]) == [
        "alike  differs: at most 1.000e+00, relative 5.000e-01",
        "lost  differs: at most 9.600e+01, relative 9.696e-01, NOT FINITE in one or both: 1",
        "signs  differs: at most 0.000e+00, relative 0.000e+00, NOT FINITE in one or both: 2",
    ]


def test_code_damage_and_nothing_are_refused_by_name(tmp_path):
    """A pickle with code, a file that is cut short, and a path without a file."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"weight": torch.zeros(1), "run": Evil()}, tmp_path / "evil.pth")
    assert_refused(run_command("inspect_checkpoint", tmp_path / "evil.pth"), "evil.pth is refused", "open")
    assert not (tmp_path / "touched").exists()
    torch.save({"weight": torch.zeros(100)}, tmp_path / "cut.bin")
    data = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:-30])
    assert_refused(run_command("inspect_checkpoint", tmp_path / "cut.bin"), "cut.bin", "cut short")
    assert_refused(run_command("inspect_checkpoint", tmp_path / "none"), "is not there")


def test_what_cannot_be_shown_is_not_called_code(tmp_path):
    torch.save({"turned": torch.ones(2, 3).t()}, tmp_path / "view.pt")
    assert_refused(
        run_command("inspect_checkpoint", tmp_path / "view.pt"),
        "Tensor turned in",
        "is not contiguous",
        ".contiguous()",
    )
    torch.save(
        {"a": torch.zeros(2, dtype=torch.complex64), "b": torch.zeros(1).to(torch.float8_e4m3fn)}, tmp_path / "odd.pt"
    )
    result = run_command("inspect_checkpoint", tmp_path / "odd.pt")
    assert_refused(result, "numbers of a kind that is not known here", "torch.ComplexFloatStorage", "float8_e4m3fn")
    assert "run code" not in result.stderr


def test_numbers_that_are_none_are_null_in_json(tmp_path):
    torch.save({"none": torch.zeros(0), "odd": torch.tensor([float("nan")])}, tmp_path / "x.pt")
    result = run_command("inspect_checkpoint", tmp_path / "x.pt", "--json")
    for line in result.stdout.splitlines():
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert (row["mean"], row["most"]) == (None, None)


def test_a_large_tensor_is_read_piece_by_piece(tmp_path, monkeypatch):
    torch.save({"large": torch.zeros(10_000_000)}, tmp_path / "large.pt")
    sizes = []

    def noting(tensor):
        sizes.append(tensor.nbytes)
        return bytes_of(tensor)

    monkeypatch.setattr(tensor_statistics, "bytes_of", noting)
    (place,) = inspect.contents_of(tmp_path / "large.pt").tensors.values()
    assert tensor_statistics.statistics_of(place).blake3 == blake3(bytes(40_000_000)).hexdigest()
    assert sum(sizes) == 40_000_000
    assert max(sizes) <= 4 << 20


def test_a_pattern_that_fits_nothing_is_told_with_names_there_are(checkpoint_dir):
    result = run_command("inspect_checkpoint", checkpoint_dir, "--keys", "zzz*")
    assert_refused(result, "No name in", "fits 'zzz*'", "Among its names are backbone.")
    result = run_command("inspect_checkpoint", checkpoint_dir, "--diff", checkpoint_dir, "--keys", "zzz*")
    assert_refused(result, "No tensor in", "fits 'zzz*'")
