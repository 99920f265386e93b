"""Healing in stages, from a file of --config: what they make, also after a kill, and what is refused."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from model_preparation import heal_in_stages, verify_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.train.heal import stages
from tests.conftest import assert_refused
from tests.train.conftest import RUN
from tests.train.cutting import outcome, run_heal, run_until, write_text
from tests.train.test_teacher_cache import ALONE


@pytest.fixture(scope="session")
def config(checkpoint_dir, text_file, tmp_path_factory) -> dict[str, object]:
    """Two stages; only the second one has a third step."""
    other = write_text(tmp_path_factory.mktemp("other") / "other.txt", words=300, seed=1)
    second = {"name": "second", "data": str(other), "method": "grafted", "block_size": 24, "milestones": ["1=early"]}
    stages = [{"name": "first", "max_steps": 2}, {**second, "gradient_checkpointing": True, "precision": "bfloat16"}]
    return {**RUN, "checkpoint": str(checkpoint_dir), "data": str(text_file), "max_steps": 4, "stages": stages}


def written(folder: Path, config: object) -> list[object]:
    (folder / "stages.yaml").write_text(yaml.safe_dump(config))
    return ["--config", folder / "stages.yaml"]


@pytest.fixture(scope="module")
def staged(config, tmp_path_factory) -> Path:
    """What the stages make without a kill."""
    folder = tmp_path_factory.mktemp("staged")
    result = run_heal(*written(folder, config), "--output_dir", folder / "out")
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder / "out"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_state_dict.pt")


def test_stages_are_healings_one_after_the_other(heal, staged, config, tmp_path):
    assert heal(tmp_path / "first", "--max_steps", 2, "--dtype", "float32", "--format", "hf").returncode == 0
    more = ("--method", "grafted", "--block_size", 24, "--gradient_checkpointing", "--precision", "bfloat16")
    more += ("--checkpoint", tmp_path / "first", "--data", config["stages"][1]["data"], "--max_steps", 4)
    assert heal(tmp_path / "second", *more, "--format", "pt").returncode == 0
    wanted = weights(tmp_path / "second")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(staged).items())
    assert verify_checkpoint(staged) == []


def test_plan_and_result_name_every_stage(staged, checkpoint_dir):
    lines = (staged.parent / "stdout").read_text().splitlines()[1:]
    assert lines[0] == "2 stages:"
    assert lines[1] == "  first: 2 steps on text.txt, 16 tokens per sequence, learning rate 0.01, method full"
    assert lines[2].startswith("  second: 4 steps on other.txt, 24 tokens per sequence")
    assert lines[3] == "Stage first"
    info = json.loads((staged / "checkpoint_info.json").read_text())
    assert [step["from"]["id"] for step in info["descent"][-2:]] == [checkpoint_dir.name, "first"]
    (first,) = info["healing"]["earlier_stages"]
    assert [each["settings"]["stage"] for each in (first, info["healing"])] == ["first", "second"]
    assert [each["steps"] for each in (first, info["healing"])] == [2, 4]
    states = staged.with_name("out_resume")
    assert sorted(path.name for path in states.iterdir()) == ["first", "second_resume"]
    assert (states / "second_resume" / "early").is_dir()
    used = yaml.safe_load(staged.with_name("out.config.yaml").read_text())
    assert [stage["name"] for stage in used["stages"]] == ["first", "second"]


def test_killed_in_the_second_stage_they_end_with_the_same_bits(staged, config, tmp_path):
    args = [*written(tmp_path, config), "--output_dir", tmp_path / "out"]
    assert run_until(args, 3, 0)[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    code, text = run_until(args)
    assert code == 0, text
    assert f"Stage first is done: {tmp_path / 'out_resume' / 'first'}" in text
    assert "Resuming from" in text
    assert outcome(tmp_path / "out", "second") == outcome(staged, "second")
    assert run_until([*args, "--overwrite", "--clean_up"])[0] == 0
    assert all(torch.equal(tensor, weights(staged)[name]) for name, tensor in weights(tmp_path / "out").items())
    assert [path.name for path in (tmp_path / "out_resume").iterdir()] == ["second_resume"]  # with the milestone


def test_stages_that_were_done_otherwise_are_named(staged, config, tmp_path):
    shutil.copytree(staged.with_name("out_resume"), tmp_path / "out_resume")
    config = {**config, "stages": [{"name": "first", "max_steps": 3}, *config["stages"][1:]]}
    refused = run_heal(*written(tmp_path, config), "--output_dir", tmp_path / "out")
    assert_refused(refused, "first is stage first of another run (max_steps: was 2, is now 3)", "--resume never")


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ([], ["There are no stages"]),
        ("first", ["line 1: stages must be a list"]),
        ([{"data": "text.txt"}], ["Stage 1 has no name"]),
        ([{"name": "a"}, {"name": "a"}], ["Two stages have the name a"]),
        ([{"name": "a/b"}], ["Stage 1 has the name 'a/b'"]),
        ([{"name": "a", "blok_size": 3}], ["line 3: there is no key 'blok_size'. The nearest is block_size."]),
        ([{"name": "a", "output_dir": "x"}], ["Stage a has the unknown key 'output_dir'"]),
        ([{"name": "a", "block_size": 1}], ["block_size: 1 is too small"]),
        ([{"name": "a", "lora_rank": 4}], ["Stage a: lora_rank is given", "without method lora"]),
        ([{"name": "a", "data": "./none.txt"}], ["Stage a: none.txt is not there"]),
    ],
)
def test_stages_that_cannot_be_are_named_before_anything_is_trained(listed, words, config, tmp_path):
    given = {"stages": listed, "checkpoint": config["checkpoint"], "data": config["data"]}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    flags = ("--config", tmp_path / "stages.yaml", "--output_dir", tmp_path / "out")
    assert_refused(run_heal(*flags, cwd=tmp_path), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["stages.yaml"]


def test_weights_to_begin_with_are_those_of_the_first_stage(config, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(stages, "heal_checkpoint", lambda *places, **given: calls.append((places, given)) or {})
    monkeypatch.setattr(stages, "PartialState", lambda cpu: ALONE)
    text, out = config["data"], tmp_path / "out"
    plan = [{"name": "a", "data": text}, {"name": "b", "data": text, "seed": 5}, {"name": "c", "init_from": "scratch"}]
    heal_in_stages(config["checkpoint"], plan, out, data=text, init_from=config["checkpoint"], seed=3)
    work = tmp_path / "out_resume"
    begun = [Path(config["checkpoint"]), work / "a", work / "b"]
    assert [places for places, _ in calls] == list(zip(begun, [text] * 3, [work / "a", work / "b", out], strict=True))
    assert [given.get("init_from") for _, given in calls] == [config["checkpoint"], None, "scratch"]
    assert [given["seed"] for _, given in calls] == [3, 5, 3]
    assert [given["dtype"] for _, given in calls] == [torch.float32] * 3


def test_what_does_not_go_with_stages_is_named(staged, config, tmp_path):
    flags = (*written(tmp_path, config), "--output_dir", tmp_path / "out")
    for more, words, code in (
        (("--milestones", "1=x"), "--milestones belongs into a stage", 2),
        (("--merge_adapter", tmp_path), "--merge_adapter trains nothing", 2),
        (("--resume", tmp_path), "each stage finds its own", 1),
        (("--output_dir", staged), "exists already", 1),
        (("--resume_dir", staged.with_name("out_resume") / "second_resume"), "states of a run without stages", 1),
    ):
        assert_refused(run_heal(*flags, *more), words, code=code)
    given = {"data": config["data"], "milestones": {1: "x"}}
    with pytest.raises(SurgeryError, match="milestones belongs into a stage"):
        heal_in_stages(config["checkpoint"], [{"name": "a"}], tmp_path / "out", **given)
    with pytest.raises(SurgeryError, match="Stage a has no data"):
        heal_in_stages(config["checkpoint"], [{"name": "a"}], tmp_path / "out")
    with pytest.raises(SurgeryError, match=r"Stage a has the unknown key 'blocksize'\. The nearest is block_size"):
        heal_in_stages(config["checkpoint"], [{"name": "a", "blocksize": 3}], tmp_path / "out", data=config["data"])
