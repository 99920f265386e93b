"""A checkpoint loads in every documented way, each in a process of its own in another folder, with the same bits."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from model_preparation import SurgeryError, load_checkpoint
from tests.conftest import on_devices, run_python

IDS = [[5, 17, 99, 3, 42, 8]]

# Each way defines `model`, given `folder`.
WAYS = {
    "torch.load with the import": """
import model_preparation, torch
model = torch.load(folder + "/model.pt")
""",
    "torch.load without the import": """
import sys, torch
model = torch.load(folder + "/model.pt", weights_only=False)
""",
    "state dict into the architecture of checkpoint_info.json": """
import json, torch
from transformers import AutoModelForCausalLM
from model_preparation import LlambaConfig
config = LlambaConfig.from_dict(json.load(open(folder + "/checkpoint_info.json"))["config"])
model = AutoModelForCausalLM.from_config(config).eval()
model.load_state_dict(torch.load(folder + "/model_state_dict.pt"), strict=True)
""",
    "load_checkpoint": """
import torch
from model_preparation import load_checkpoint
model, tokenizer = load_checkpoint(folder, device="cpu")
assert tokenizer("Hello").input_ids
""",
}
PROBE = """
assert not model.training
assert {p.device.type for p in model.parameters()} == {"cpu"}
with torch.no_grad():
    logits = model(torch.tensor(IDS)).logits
tokens = model.generate(torch.tensor(IDS), max_new_tokens=8, eos_token_id=None, do_sample=False)
torch.save({"logits": logits, "tokens": tokens}, "found.pt")
"""


@pytest.fixture(scope="module")
def expected(checkpoint_dir) -> dict:
    model, _ = load_checkpoint(checkpoint_dir)
    with torch.no_grad():
        ids = torch.tensor(IDS)
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        return {"logits": model(torch.tensor(IDS)).logits, "tokens": ids}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_bits(way, checkpoint_dir, expected, quick_python, tmp_path):
    script = f"folder = {str(checkpoint_dir)!r}\nIDS = {IDS}\n{WAYS[way]}\n{PROBE}"
    result = run_python("-c", script, cwd=tmp_path, python=quick_python)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found["tokens"], expected["tokens"])


def test_the_lines_in_readme_txt_run_as_they_stand(checkpoint_dir, quick_python, tmp_path):
    text = (checkpoint_dir / "README.txt").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        (tmp_path / f"block{number}.py").write_text(re.sub("^    ", "", block, flags=re.MULTILINE))
    # One process for all four: each defines `model` anew; the second imports the package, so the third needs no import.
    script = "".join(f"exec(open({str(tmp_path / f'block{n}.py')!r}).read()); models.append(model)\n" for n in range(4))
    probe = "ids = torch.tensor([[1, 2, 3]])\nlogits = [m(ids).logits for m in models]\n"
    probe += "assert all(torch.equal(logits[0], other) for other in logits)\nprint(len(models), 'loaded')"
    result = run_python("-c", f"import torch\nmodels = []\n{script}{probe}", cwd=checkpoint_dir, python=quick_python)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("4 loaded\n")


def test_torch_load_without_import_and_with_weights_only_names_what_it_refuses(checkpoint_dir, quick_python, tmp_path):
    result = run_python(
        "-c", f"import torch; torch.load({str(checkpoint_dir / 'model.pt')!r})", cwd=tmp_path, python=quick_python
    )
    assert result.returncode == 1
    assert "Weights only load failed" in result.stderr


def test_importing_the_package_does_not_make_code_loadable(quick_python, tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save(Attack(), tmp_path / "model.pt")
    result = run_python(
        "-c", "import model_preparation, torch; torch.load('model.pt')", cwd=tmp_path, python=quick_python
    )
    assert result.returncode == 1
    assert "executed" not in result.stdout
    assert "print" in result.stderr


@pytest.fixture
def copied(checkpoint_dir, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "copy"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_come_off(copied, expected, prefix):
    path = copied / "model_state_dict.pt"
    torch.save({prefix + name: tensor for name, tensor in torch.load(path).items()}, path)
    model, _ = load_checkpoint(copied)
    assert torch.equal(model(torch.tensor(IDS)).logits, expected["logits"])


def test_load_checkpoint_maps_the_file(checkpoint_dir):
    model, _ = load_checkpoint(checkpoint_dir)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert str(checkpoint_dir / "model_state_dict.pt") in maps.read_text()
    assert all(not parameter.is_meta for parameter in model.parameters())


def test_load_checkpoint_casts_and_the_file_stays_as_it_is(copied, expected):
    before = (copied / "model_state_dict.pt").read_bytes()
    model, _ = load_checkpoint(copied, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = model(torch.tensor(IDS)).logits.float()
    assert (
        (logits - expected["logits"]).abs().max() / expected["logits"].std()
    ).item() < 0.3  # weights far larger than a real model's
    model, _ = load_checkpoint(copied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # private to this process, although the file is mapped
    assert (copied / "model_state_dict.pt").read_bytes() == before


def test_a_loaded_model_can_be_trained_and_saved_again(checkpoint_dir, tmp_path):
    model, _ = load_checkpoint(checkpoint_dir)
    model.train()
    loss = model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()
    torch.save(model, tmp_path / "mine.pt")
    again = torch.load(tmp_path / "mine.pt")
    assert torch.equal(again(torch.tensor(IDS)).logits, model(torch.tensor(IDS)).logits)


def damage(folder: Path, what: str) -> None:
    info_path, state_path = folder / "checkpoint_info.json", folder / "model_state_dict.pt"
    info = json.loads(info_path.read_text())
    if what == "no commit mark":
        info_path.unlink()
    elif what == "newer format":
        info_path.write_text(json.dumps({**info, "format_version": 99}))
    elif what == "cut info":
        info_path.write_text(info_path.read_text()[:100])
    elif what == "cut weights":
        state_path.write_bytes(state_path.read_bytes()[:-1000])
    elif what == "no weights":
        state_path.unlink()
    elif what == "other weights":
        state = torch.load(state_path)
        state["backbone.final_layernorm.weight"] = torch.ones(7)
        torch.save(state, state_path)
    elif what == "missing weights":
        state = torch.load(state_path)
        del state["lm_head.weight"]
        torch.save(state, state_path)
    elif what == "pickled code":
        torch.save({"weights": pytest.raises}, state_path)
    elif what == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif what == "gone":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no commit mark", "no checkpoint_info.json"),
        ("newer format", "format version 99; this program knows 1"),
        ("cut info", "checkpoint_info.json cannot be read"),
        ("cut weights", "model_state_dict.pt cannot be read"),
        ("no weights", "model_state_dict.pt is missing"),
        ("other weights", r"backbone.final_layernorm.weight has shape \[7\] instead of \[32\]"),
        ("missing weights", r"lm_head.weight has shape none instead of \[264, 32\]"),
        ("pickled code", "model_state_dict.pt cannot be read"),
        ("no tokenizer", "No tokenizer can be loaded"),
        ("gone", "is not there"),
    ],
)
def test_damage_is_named(copied, what, words):
    damage(copied, what)
    with pytest.raises(SurgeryError, match=words):
        load_checkpoint(copied)


@on_devices
def test_straight_to_a_device(checkpoint_dir, expected, device):
    pickled = torch.load(checkpoint_dir / "model.pt", map_location=device)
    for model in (load_checkpoint(checkpoint_dir, device=device)[0], pickled):
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        logits = model(torch.tensor(IDS).to(device)).logits.cpu()
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-3, atol=1e-3)
