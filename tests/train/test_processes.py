"""Healing by two processes over gloo: DDP and FSDP, stopped, resumed, and with another number of processes."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from model_preparation import verify_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.io.digests import describe_files
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.train.heal import teacher_cache
from model_preparation.train.heal.resume_state import STATE_FILE, ResumeState, check_state, list_states, read_state
from tests.conftest import PACKAGE, tiny_config, tiny_llama_cfg
from tests.train.conftest import RUN
from tests.train.cutting import outcome, run_until, write_text
from tests.train.test_conversations import PLAIN, write_many

CONFIGS = PACKAGE.parent / "scripts" / "accelerate"


def environment_of(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file CONFIG` would tell the processes it starts."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "heal_checkpoint.py"])
    args, _, _ = _validate_launch_command(args)
    told = prepare_multi_gpu_env(args)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def slow_flags(flags) -> list[object]:
    """Flags with steps so small that the number of sequences per step matters little."""
    return [*flags, "--learning_rate", 1e-3]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_state_dict.pt")


def healing(folder: Path) -> dict:
    return json.loads((folder / "checkpoint_info.json").read_text())["healing"]


def seen(folder: Path) -> int:
    return healing(folder)["sequences_seen"]


def loss_after(folder: Path) -> float:
    return healing(folder)["scores"]["after"]["eval_loss"]


def test_the_held_out_loss_is_that_of_each_sequence_once_whatever_the_processes(flags, tmp_path):
    """Sequences that only fill up the last batches count in no mean."""
    write_text(tmp_path / "other.txt", words=50, seed=5)
    more = ["--eval_data", tmp_path / "other.txt", "--max_steps", 1, "--eval_interval", 1]
    found = {}
    for processes, batch_size in ((1, 2), (2, 4)):
        out = tmp_path / f"out_{processes}_{batch_size}"
        code, text = run_until([*flags, *more, "--batch_size", batch_size, "--output_dir", out], processes=processes)
        assert code == 0, text
        assert healing(out)["data"]["held_out_sequences"] % (processes * batch_size)
        found[processes, batch_size] = healing(out)["scores"]["before"]["eval_loss"]
    assert found[2, 4] == pytest.approx(found[1, 2], abs=1e-5)


def newest_state(output_dir: Path) -> ResumeState:
    return list_states(output_dir.with_name(f"{output_dir.name}_resume"))[0][-1]


def test_two_then_one_then_two_processes_are_the_same_run(slow_flags, tmp_path):
    flags = [*slow_flags, "--dropout", 0]  # dropout's draws differ with the number of processes
    assert run_until([*flags, "--accumulation", 4, "--output_dir", tmp_path / "one"])[0] == 0
    args = [*flags, "--output_dir", tmp_path / "out", "--save_steps", 1]
    run_until(args, 2, 0, processes=2)
    two = newest_state(tmp_path / "out")
    text = run_until(args, two.steps + 2, 0)[1]
    words = f"The {8 * two.steps} sequences seen so far were {two.steps} steps, and count as {two.steps} steps now."
    step = "Each step has 8 sequences, in 4 forward passes of each process. The last step is step 6."
    assert f"{words} {step}" in text
    assert newest_state(tmp_path / "out").info["world_size"] == 1
    code, text = run_until(args, processes=2)
    assert code == 0
    assert "Processes: 2 instead of 1." in text
    assert seen(tmp_path / "out") == seen(tmp_path / "one") == 48
    assert loss_after(tmp_path / "out") == pytest.approx(loss_after(tmp_path / "one"), abs=1e-4)
    torch.testing.assert_close(weights(tmp_path / "out"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-4)


def test_packed_conversations_are_the_same_run_by_one_process_by_two_and_in_shards(slow_flags, tmp_path):
    """Every label counts alike, however many of them a process has."""
    (tmp_path / "template.jinja").write_text(PLAIN)
    data = write_many(tmp_path / "many.jsonl")
    flags = [*slow_flags, "--data", data, "--chat_template", tmp_path / "template.jinja"]
    flags += ["--packing", "--block_size", 96, "--dropout", 0, "--max_steps", 3]
    assert run_until([*flags, "--accumulation", 4, "--output_dir", tmp_path / "one"])[0] == 0
    for config in ("ddp.yaml", "fsdp.yaml"):
        code, text = run_until([*flags, "--output_dir", tmp_path / config], processes=2, env=environment_of(config))
        assert code == 0, text
        assert verify_checkpoint(tmp_path / config) == []
        assert seen(tmp_path / config) == seen(tmp_path / "one") == 24
        assert loss_after(tmp_path / config) == pytest.approx(loss_after(tmp_path / "one"), abs=1e-4)
        torch.testing.assert_close(weights(tmp_path / config), weights(tmp_path / "one"), rtol=1e-4, atol=1e-4)


def test_where_a_step_cannot_stay_the_same_sequences_it_is_converted(slow_flags, tmp_path):
    args = [*slow_flags, "--accumulation", 1, "--max_steps", 12, "--output_dir", tmp_path / "out", "--save_steps", 1]
    run_until(args, 3, 0)
    one = newest_state(tmp_path / "out")
    text = run_until(args, one.steps // 2 + 2, 0, processes=2)[1]
    words = (
        f"The {2 * one.steps} sequences seen so far were {one.steps} steps, and count as {one.steps // 2} steps now."
    )
    assert f"{words} Each step has 4 sequences" in text
    two = newest_state(tmp_path / "out")
    # One process may have done half a step of two processes. That half is not done twice.
    assert two.sequences_seen == 4 * two.steps + 2 * one.steps % 4
    code, text = run_until(args)
    assert code == 0
    assert f"were {two.steps} steps, and count as {two.sequences_seen // 2} steps now." in text
    assert seen(tmp_path / "out") == 24


@pytest.fixture(scope="module", params=["ddp.yaml", "fsdp.yaml"])
def staged(request, checkpoint_dir, donor_dir, tmp_path_factory) -> Iterator[tuple]:
    """What two processes make in two stages without a kill, and the arguments of `run_until` for it."""
    folder = tmp_path_factory.mktemp("staged")
    text = write_text(folder / "text.txt", words=100)
    learning = {"teacher": str(donor_dir), "teacher_cache": str(folder / "cache"), "teacher_top_k": 8}
    stages = [{"name": "first", **learning, "max_steps": 1}, {"name": "second", "block_size": 40, "segment_length": 16}]
    given = {**RUN, "checkpoint": str(checkpoint_dir), "data": str(text), "max_steps": 3, "stages": stages}
    (folder / "stages.yaml").write_text(yaml.safe_dump({**given, "accumulation": 1, "save_steps": 1}))
    args, how = ["--config", folder / "stages.yaml"], {"processes": 2, "env": environment_of(request.param)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(teacher_cache, "_SHARD_BYTES", 1)  # a shard for each sequence: the processes share them
        code, text = run_until([*args, "--output_dir", folder / "whole"], **how)
        assert code == 0, text
        yield folder / "whole", args, how


def test_stages_with_a_teacher_on_the_disk_and_segments_are_the_same_after_a_kill(staged, tmp_path):
    whole, args, how = staged
    args = [*args, "--output_dir", tmp_path / "out"]
    first_only = shutil.ignore_patterns("second_resume")
    shutil.copytree(whole.with_name("whole_resume"), tmp_path / "out_resume", ignore=first_only)
    assert run_until(args, 2, 0.02, **how)[0] == -9
    assert not (tmp_path / "out").exists()
    code, text = run_until(args, **how)
    assert code == 0, text
    assert "Stage first is done" in text
    assert "Resuming from" in text
    assert outcome(tmp_path / "out", "second") == outcome(whole, "second")
    assert verify_checkpoint(whole) == []
    sequences = json.loads((whole.parent / "cache" / "teacher_cache.json").read_text())["inputs"]["number of sequences"]
    assert len(list((whole.parent / "cache").glob("*.safetensors"))) == sequences > 2
    assert seen(whole) == 3 * 2 * RUN["batch_size"]


def test_a_state_of_two_processes_has_what_each_of_them_needs(staged):
    whole, _, how = staged
    newest = newest_state(whole.with_name("whole_resume") / "second")
    assert newest.info["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= newest.info["files"].keys()
    is_sharded = how["env"].get("ACCELERATE_USE_FSDP") == "true"
    shards = {name for name in newest.info["files"] if name.endswith(".distcp")}
    folders = ("optimizer_0", "pytorch_model_fsdp_0") if is_sharded else ()
    assert shards == {f"{folder}/__{rank}_0.distcp" for folder in folders for rank in (0, 1)}


@pytest.mark.parametrize("staged", ["fsdp.yaml"], indirect=True)
def test_shards_with_code_in_them_are_refused_by_name(staged, tmp_path):
    shutil.copytree(newest_state(staged[0].with_name("whole_resume") / "second").folder, tmp_path / "state")
    optimizer = tmp_path / "state" / "optimizer_0"
    metadata = pickle.loads((optimizer / ".metadata").read_bytes())  # noqa: S301  # just written
    check_state(read_state(tmp_path / "state"))

    def refused(by: str) -> None:
        mark = tmp_path / "state" / STATE_FILE
        info = json.loads(mark.read_text())
        info["files"] = describe_files(tmp_path / "state", excluded=[STATE_FILE])
        mark.write_text(json.dumps(info))
        with pytest.raises(SurgeryError, match=by):
            check_state(read_state(tmp_path / "state"))

    index = next(index for index in metadata.storage_data if index.fqn.endswith(".lr"))
    place = metadata.storage_data[index]
    torch.save({"lr": os.system}, optimizer / "__9_0.distcp")
    place.relative_path, place.offset = "__9_0.distcp", 0
    place.length = (optimizer / "__9_0.distcp").stat().st_size
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(r"optimizer_0/\.metadata is refused \(its entry 'optimizer.*lr' in __9_0\.distcp: .*posix\.system")
    place.relative_path = "../__9_0.distcp"
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
    refused("outside its folder")
    place.length = float("inf")
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(r"its pickle is damaged \(OverflowError\)")
    (optimizer / ".metadata").write_bytes(b"cpathlib\nWindowsPath\n(Vx\ntR.")
    refused("its pickle is damaged")
    metadata.version = os.system
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(r"it names posix\.system, which could run code")
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata)[:500])
    refused("damaged|posix")


def test_the_shipped_config_shards_by_the_hybrids_layers():
    told = environment_of("fsdp.yaml")
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in told  # accelerate asks the model then
    names = LlambaForCausalLM(tiny_config(llama_layers=[1], llama_cfg=tiny_llama_cfg()))._no_split_modules
    assert names == {"LlambaDecoderLayer", "LlamaDecoderLayer"}
    assert LlambaForCausalLM(tiny_config())._no_split_modules == {"LlambaDecoderLayer"}
    assert told["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
