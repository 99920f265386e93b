"""Healing runs stopped in every way: what is on the disk then, and that they go on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model_preparation.errors import SurgeryError
from model_preparation.io.digests import describe_file
from model_preparation.train.heal.heal_trainer import HealTrainer
from model_preparation.train.heal.resume_state import (
    STATE_FILE,
    check_state,
    finish_state,
    list_states,
    load_plain,
    place_for,
    read_state,
    rotate,
    set_aside_after,
)
from model_preparation.train.heal.settings import HealSettings, saved_settings
from tests.conftest import assert_refused, on_devices
from tests.train.cutting import outcome, run_until

FIELDS = {
    "settings": {},
    "model_args": {},
    "parent": {"id": "a", "tensor_digests_sha256": "b"},
    "data": {"blake3": "c", "sequences": 1, "held_out_blake3": None},
}


def make_state(folder: Path, step: int, world_size: int = 1) -> Path:
    """A complete state, but with a number in place of weights."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    seen = {"iter_num": step, "sequences_seen": step * world_size, "world_size": world_size}
    unlogged = {"losses": [0.0] * world_size, "last_logged": 0}
    finish_state(path, {**FIELDS, **seen, "unlogged": unlogged})
    return path


def copy_states(healed: Path, output_dir: Path) -> Path:
    """Copy the states of `healed` to where a run to `output_dir` looks for its own."""
    states = output_dir.with_name(f"{output_dir.name}_resume")
    shutil.copytree(healed.with_name(f"{healed.name}_resume"), states)
    return states


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(flags, heal, healed, tmp_path):
    moments = random.Random(os.urandom(8))
    out = tmp_path / "out"
    steps = sorted(moments.choices(range(6), k=2))
    killed = [run_until([*flags, "--output_dir", out], step, moments.random() * 0.05)[0] for step in steps]
    assert -signal.SIGKILL in killed
    assert not out.exists()
    result = heal(out)
    assert result.returncode == 0, result.stderr
    assert outcome(out) == outcome(healed), f"killed after steps {steps}"


def test_asked_to_stop_a_run_saves_where_it_is_and_ends_with_the_same_bits(flags, heal, healed, tmp_path):
    out = tmp_path / "out"
    more = ["--output_dir", out, "--milestones", "1=early"]  # at this step, no other state is saved
    assert run_until([*flags, *more], 3, 0, signal.SIGTERM)[0] == 143
    states, _ = list_states(tmp_path / "out_resume")
    assert states[-1].steps in (4, 5)
    assert heal(out, *more).returncode == 0
    assert outcome(out) == outcome(healed)
    # The milestone was not rotated away, and a run can go on from it.
    assert read_state(tmp_path / "out_resume" / "early").steps == 1
    (tmp_path / "out_resume" / "checkpoint-6.aside").mkdir()  # this name is taken
    result = heal(out, *more, "--resume", tmp_path / "out_resume" / "early", "--overwrite")
    assert "checkpoint-6 has seen more sequences than early: it is renamed to checkpoint-6.aside-2." in result.stdout
    assert outcome(out) == outcome(healed)


def test_a_state_has_everything_in_it(healed):
    state = list_states(healed.with_name(f"{healed.name}_resume"))[0][-1]
    assert set(state.info["files"]) == {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("trainer_state.json", "training_args.json"),
    }
    assert set(load_plain(state.folder / "rng_state.pth")) >= {"python", "numpy", "cpu"}
    trainer_state = json.loads((state.folder / "trainer_state.json").read_text())
    assert trainer_state["global_step"] == state.info["iter_num"] == 6
    assert state.info["best_val_loss"] == trainer_state["best_metric"]
    assert json.loads((state.folder / "training_args.json").read_text())["learning_rate"] == 1e-2
    assert state.info["world_size"] == 1
    assert state.info["settings"]["accumulation"] == 2
    assert state.info["model_args"]["llama_layers"] == [1, 3]
    assert len(state.info["run_id"]) == 21
    assert state.info["epoch"] == 24 / state.info["data"]["sequences"]


def test_what_is_half_written_is_skipped_and_named(heal, healed, tmp_path):
    states = copy_states(healed, tmp_path / "out")
    (states / "checkpoint-6" / STATE_FILE).unlink()
    (states / "checkpoint-8.partial").mkdir()
    (states / "checkpoint-8.partial" / ".held_by").write_text("{}")
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, elsewhere = (f"checkpoint-9.partial-{host}-{ended.pid}" for host in (socket.gethostname(), "elsewhere"))
    for name in (here, elsewhere):  # as on a file system without locks
        shutil.copytree(states / "checkpoint-8.partial", states / name)
    result = heal(tmp_path / "out")
    ends = {
        "checkpoint-6": "renamed to checkpoint-6.aside",
        **dict.fromkeys(["checkpoint-8.partial", here], "removed"),
        elsewhere: "left there",
    }
    for name, end in ends.items():
        why = "is damaged, or incomplete because its run was killed: it is not used, and"
        assert f"{states / name} {why} {end}." in result.stdout
    assert f"Resuming from {states / 'checkpoint-4'}" in result.stdout
    assert outcome(tmp_path / "out") == outcome(healed)
    names = sorted(path.name for path in states.iterdir())
    assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-6", "checkpoint-6.aside", elsewhere]


def test_a_state_of_another_format_version_hides_no_other_fault(tmp_path):
    other, damaged = make_state(tmp_path, 2), make_state(tmp_path, 4)
    info = json.loads((other / STATE_FILE).read_text())
    (other / STATE_FILE).write_text(json.dumps({**info, "format_version": 9}))
    (damaged / STATE_FILE).write_text("{")
    assert list_states(tmp_path, damaged_too=True) == ([], ["checkpoint-2", "checkpoint-4"])
    with pytest.raises(SurgeryError, match=r"checkpoint-4/resume_state\.json cannot be read"):
        read_state(damaged)
    with pytest.raises(SurgeryError, match="checkpoint-2 has format version 9"):
        list_states(tmp_path)


def test_a_damaged_state_is_named_and_the_one_before_it_offered(heal, healed, tmp_path):
    states = copy_states(healed, tmp_path / "out")
    path = states / "checkpoint-6" / "optimizer.pt"
    whole = path.read_bytes()
    for content, word in ((whole[:-100], "bytes long instead of"), (whole[:500] + b"!" + whole[501:], "changed")):
        path.write_bytes(content)
        assert_refused(heal(tmp_path / "out"), str(path), word, f"--resume {states / 'checkpoint-4'}")
    path.unlink()
    assert_refused(heal(tmp_path / "out"), f"{path} is missing", f"--resume {states / 'checkpoint-4'}")
    before = sorted(folder.name for folder in states.iterdir())
    other = states / "checkpoint-4" / "model.safetensors"
    weights = other.read_bytes()
    # Now checkpoint-4 is damaged too. It is not offered, and no state is put aside for it.
    other.write_bytes(weights[:-1])
    assert_refused(heal(tmp_path / "out"), f"{path} is missing", f"--resume {states / 'checkpoint-3'}")
    refused = heal(tmp_path / "out", "--resume", states / "checkpoint-4")
    assert_refused(refused, str(other), f"--resume {states / 'checkpoint-3'}")
    assert sorted(folder.name for folder in states.iterdir()) == before
    other.write_bytes(weights)
    mark = states / "checkpoint-6" / STATE_FILE
    mark.write_text(mark.read_text()[:-50])
    assert_refused(heal(tmp_path / "out"), f"{mark} cannot be read", f"--resume {states / 'checkpoint-4'}")
    assert_refused(heal(tmp_path / "out", "--resume", states), "holds states, the newest checkpoint-4")
    assert heal(tmp_path / "out", "--resume", states / "checkpoint-4").returncode == 0
    assert outcome(tmp_path / "out") == outcome(healed)


def test_a_state_with_code_in_it_is_refused_by_name(heal, healed, tmp_path):
    states = copy_states(healed, tmp_path / "out")
    folder = states / "checkpoint-6"
    torch.save({"python": os.system}, folder / "rng_state.pth")
    info = json.loads((folder / STATE_FILE).read_text())
    info["files"]["rng_state.pth"] = describe_file(folder / "rng_state.pth")
    (folder / STATE_FILE).write_text(json.dumps(info))
    assert_refused(heal(tmp_path / "out"), str(folder / "rng_state.pth"), "posix.system")
    with pytest.raises(SurgeryError, match=r"posix\.system"):
        load_plain(folder / "rng_state.pth")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (STATE_FILE, {"parent": {}}),
        (STATE_FILE, {"data": {}}),
        (STATE_FILE, {"unlogged": {}}),
        (STATE_FILE, {"unlogged": {"losses": ["x"], "last_logged": 0}}),
        (STATE_FILE, {"unlogged": {"losses": [], "last_logged": 0}}),
        (STATE_FILE, {"run_id": 5}),
        (STATE_FILE, {"texts": [{"prompt": 5}]}),
        (STATE_FILE, {"files": {"optimizer.pt": 5}}),
        ("trainer_state.json", {"global_step": "x"}),
        ("trainer_state.json", {"log_history": "x"}),
        ("trainer_state.json", {"log_history": [{"step": 1, "loss": "x"}]}),
        ("trainer_state.json", {"best_metric": "x"}),
        ("trainer_state.json", {"unheard_of": 1}),
        ("trainer_state.json", None),
    ],
)
def test_a_state_that_no_run_can_have_written_is_refused(healed, tmp_path, name, change):
    folder = copy_states(healed, tmp_path / "out") / "checkpoint-6"
    content = json.loads((folder / name).read_text())
    (folder / name).write_text("[" * 100_000 if change is None else json.dumps(content | change))
    if name != STATE_FILE:
        info = json.loads((folder / STATE_FILE).read_text())
        info["files"][name] = describe_file(folder / name)
        (folder / STATE_FILE).write_text(json.dumps(info))
    with pytest.raises(SurgeryError, match=rf"{name} (cannot be read|is refused) .*--resume .*checkpoint-4"):
        check_state(read_state(folder))


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", "x"), ("teacher", 5), ("exclude", [1]), ("batch_size", True)]
)
def test_settings_of_a_state_that_cannot_be(healed, name, value):
    with pytest.raises(SurgeryError, match=f"settings are not valid: {name}"):
        saved_settings(HealSettings().as_dict() | {name: value})
    assert saved_settings(HealSettings().as_dict()) == HealSettings()


def test_what_does_not_fit_into_a_run_is_told(heal, healed, tmp_path):
    folder = copy_states(healed, tmp_path / "out") / "checkpoint-4"
    shutil.rmtree(folder.with_name("checkpoint-6"))
    info = json.loads((folder / STATE_FILE).read_text())
    odd = {"rng_state.pth": {}, "scheduler.pt": 5, "optimizer.pt": {"state": {}, "param_groups": []}}
    for name, content in odd.items():
        torch.save(content, folder / name)
        info["files"][name] = describe_file(folder / name)
        (folder / STATE_FILE).write_text(json.dumps(info))
        refused = heal(tmp_path / "out")
        assert_refused(refused, f"{folder / name} does not fit this run", f"--resume {folder.parent / 'checkpoint-3'}")


def test_a_run_that_goes_on_has_the_settings_it_was_started_with(heal, healed, tmp_path):
    states = copy_states(healed, tmp_path / "out")
    (states / "checkpoint-6" / STATE_FILE).unlink()
    more = ("--init_from", "scratch", "--milestones", "3=past")
    result = heal(tmp_path / "out", "--learning_rate", 0.5, "--seed", 3, "--save_total_limit", 2, *more)
    assert "init_from stays 'checkpoint'" in result.stdout
    assert "The milestone past is not saved: the run is past its step 3." in result.stdout
    assert "learning_rate stays 0.01, as at the start of the run; 0.5 is ignored" in result.stdout
    assert "seed stays 0" in result.stdout
    assert "--prompt" not in result.stdout
    assert outcome(tmp_path / "out") == outcome(healed)
    ids = {read_state(path).info["run_id"] for path in states.glob("checkpoint-?")}
    assert len(ids) == 1  # so that a tracker shows one run
    longer = heal(tmp_path / "out", "--max_steps", 7, "--overwrite")
    assert "max_steps is now 7, was 6" in longer.stdout
    assert list_states(states)[0][-1].steps == 7
    again = heal(tmp_path / "out", "--max_steps", 7, "--overwrite", "--prompt", "another")
    assert "The run keeps the prompts that it began with: --prompt is ignored." in again.stdout
    assert "checkpoint-7 has done all of these steps" in again.stdout
    refused = heal(tmp_path / "out", "--max_steps", 5, "--overwrite")
    assert_refused(refused, "has done 7 steps, more than --max_steps 5", "--resume DIR")


def test_other_text_or_another_checkpoint_is_another_run(heal, healed, base_dir, layers_dir, tmp_path):
    from model_preparation import build_checkpoint

    copy_states(healed, tmp_path / "out")
    (tmp_path / "other.txt").write_text("another text " * 100)
    assert_refused(heal(tmp_path / "out", "--data", tmp_path / "other.txt"), "other sequences")
    build_checkpoint(str(base_dir), [1], layers_dir, tmp_path / "other")
    refused = heal(tmp_path / "out", "--checkpoint", tmp_path / "other")
    assert_refused(refused, "belongs to a run that heals tiny_1_3", "parent: the content has changed")
    assert_refused(heal(tmp_path / "out", "--resume", "never"), "holds states of a run", "checkpoint-6")


def test_a_parent_or_teacher_that_was_replaced_is_another(heal, healed, checkpoint_dir, donor_dir, tmp_path):
    parent = shutil.copytree(checkpoint_dir, tmp_path / checkpoint_dir.name)
    teacher = shutil.copytree(donor_dir, tmp_path / "teacher")
    copy_states(healed, tmp_path / "out")
    weights = torch.load(parent / "model_state_dict.pt")
    torch.save({name: tensor.neg() for name, tensor in weights.items()}, parent / "model_state_dict.pt")
    refused = heal(tmp_path / "out", "--checkpoint", parent)
    assert_refused(
        refused, "belongs to a run that heals tiny_1_3", "(parent: the content has changed)", "another --output_dir"
    )
    with_teacher = ("--teacher", "llama", "--source", f"llama={teacher}", "--max_steps", 2)
    assert heal(tmp_path / "taught", *with_teacher).returncode == 0
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert_refused(heal(tmp_path / "taught", *with_teacher, "--overwrite"), "(teacher: the content has changed)")


def test_a_full_disk_leaves_the_state_before_resumable(heal, healed, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    states = tmp_path / "small"
    states.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", states], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        result = heal(tmp_path / "out", "--resume_dir", states)
        assert_refused(result, "state of step", "No space left on device", "checkpoint-2 is complete")
        assert [path.name for path in states.iterdir()] == ["checkpoint-2"]
        subprocess.run(["mount", "-o", "remount,size=9m", states], check=True)
        assert heal(tmp_path / "out", "--resume_dir", states).returncode == 0
        shutil.copytree(states, tmp_path / "out_resume")
        assert outcome(tmp_path / "out") == outcome(healed)
    finally:
        subprocess.run(["umount", states], check=True)


def test_rotation_keeps_the_newest_complete_and_the_best(tmp_path):
    for step in (9, 10, 100, 20, 3):
        make_state(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # half-written
    assert [state.steps for state in list_states(tmp_path)[0]] == [3, 9, 10, 20, 100]
    assert rotate(tmp_path, 3, "checkpoint-3") == ["checkpoint-9", "checkpoint-10"]
    assert rotate(tmp_path, 1, "checkpoint-3") == ["checkpoint-20"]
    assert [state.steps for state in list_states(tmp_path)[0]] == [3, 100]
    assert list_states(tmp_path)[1] == ["checkpoint-200"]


def test_the_newest_is_what_has_seen_most_whatever_its_step_is_called(tmp_path):
    make_state(tmp_path, 20, world_size=1)
    make_state(tmp_path, 15, world_size=2)
    assert [state.sequences_seen for state in list_states(tmp_path)[0]] == [20, 30]
    assert place_for(tmp_path, 20, 2, {"checkpoint-20"}) == tmp_path / "checkpoint-20-world2"
    assert set_aside_after(tmp_path, read_state(tmp_path / "checkpoint-20")) == {"checkpoint-15": "checkpoint-15.aside"}
    assert [state.steps for state in list_states(tmp_path)[0]] == [20]


def test_the_scaler_of_float16_is_written_and_taken_up(tmp_path):
    def trainer(scale: float) -> SimpleNamespace:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(1))  # it makes its state when it is used first
        accelerator = SimpleNamespace(scaler=scaler)
        return SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(should_save=True))

    HealTrainer._save_scaler(trainer(1024.0), str(tmp_path))
    resumed = trainer(2.0)
    HealTrainer._load_scaler(resumed, str(tmp_path))
    assert resumed.accelerator.scaler.get_scale() == 1024.0


@on_devices
def test_one_process_of_a_launcher_stops_and_goes_on_without_it(flags, heal, device, tmp_path, request):
    """A GPU run is in float16, and its sums have no fixed order. So its weights are close, but not equal."""
    out, whole, more = tmp_path / "out", tmp_path / "whole", ["--device", device]
    if device == "cuda":
        more += ["--precision", "float16"]
        assert heal(whole, *more).returncode == 0
    else:
        whole = request.getfixturevalue("healed")
    assert run_until([*flags, *more, "--output_dir", out], 3, 0, signal.SIGTERM, processes=1)[0] == 143
    result = heal(out, *more)
    assert result.returncode == 0, result.stderr
    ours, wanted = outcome(out), outcome(whole)
    if device == "cuda":
        newest = list_states(tmp_path / "out_resume")[0][-1]
        assert load_plain(newest.folder / "scaler.pt")["scale"] > 1
        assert "cuda" in load_plain(newest.folder / "rng_state.pth")
        for name in ("rng_state.pth", "scaler.pt"):
            assert ours["state"][name] == wanted["state"][name]
        left, right = (torch.load(folder / "model_state_dict.pt") for folder in (out, whole))
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-3)
    else:
        assert ours == wanted
