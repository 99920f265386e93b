"""`layer-surgery run`: one file, the whole chain; killed in the middle, changed, and run again."""

import contextlib
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model_preparation import run_experiment
from model_preparation.errors import SurgeryError
from tests.conftest import assert_refused, run_command, start_command, wait_until

pytestmark = pytest.mark.usefixtures("quick_children")

EXPERIMENT = """\
base: tiny_llamba
donor: tiny_llama
output_dir: OUT
device: cpu
search: {task: [embedded_recall], limit: 8, method: singles, top: 1, budget_evaluations: 6, race: off}
heal: {data: OUT.txt, max_steps: 2, block_size: 16, batch_size: 1, eval_interval: 0}
evaluate: {tasks: embedded_recall, lengths: [64], limit: 8, models: [base, grafted, healed]}
"""


def experiment_file(folder: Path, *changes: tuple[str, str]) -> Path:
    text = EXPERIMENT.replace("OUT", str(folder / "out"))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "experiment.yaml").write_text(text)
    return folder / "experiment.yaml"


def states(output: str) -> dict[str, str]:
    """The state of each step in the printed plan."""
    rows = [
        re.split("  +", line) for line in itertools.takewhile(str.strip, output.splitlines()[1:]) if line[0].isdigit()
    ]
    return {row[0].partition(" ")[2]: "again" if row[1].startswith("again (") else row[1] for row in rows}


def test_an_experiment_is_stopped_mended_changed_and_run_again(tmp_path, quick_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(quick_python))  # what steps are started with
    file, out = experiment_file(tmp_path), tmp_path / "out"
    journal = out / "search" / "journal.jsonl"
    missing = [("base: tiny_llamba", "base: ./gone"), ("tasks: embedded_", "tasks: embeded_")]
    named = ("base: ", "gone is not there", "data of heal: ", "out.txt is not there")
    # Before hours of work, all that is missing is named.
    assert_refused(run_command("run_experiment", experiment_file(tmp_path, missing[0])), *named)
    refused = run_command("run_experiment", experiment_file(tmp_path, *missing), "--dry_run")
    assert_refused(refused, *named, "embeded_recall")
    assert not out.exists()
    file = experiment_file(tmp_path)
    (tmp_path / "out.txt").write_text("Mia likes quinces .")
    running = start_command("run_experiment", file, log=tmp_path / "log")
    wait_until(lambda: journal.is_file() and journal.read_text().count("\n") >= 3, alive=running.is_alive)
    running.kill()
    running.join()
    wait_until(lambda: not is_open(journal))  # its child has ended too

    told = run_command("run_experiment", file, "--dry_run")
    assert told.returncode == 0, told.stderr
    names = ["extract", "search", "build", "heal", "evaluate base", "evaluate grafted", "evaluate healed", "compare"]
    assert states(told.stdout) == dict.fromkeys(names, "to do") | {"extract": "done"}
    evaluated = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    extracted = (out / "layers" / "metadata.json").stat()

    failed = run_command("run_experiment", file)
    assert_refused(failed, "heal failed", "out.txt", "shorter than one sequence", "run the same command again")
    assert journal.read_text().startswith("".join(evaluated))  # the search went on; it did not begin anew
    assert (out / "layers" / "metadata.json").stat().st_mtime_ns == extracted.st_mtime_ns
    (tmp_path / "out.txt").write_text("Mia likes quinces . Rosa likes eggs . Mia likes quinces . " * 60)
    mended = run_command("run_experiment", file)
    assert mended.returncode == 0, mended.stderr
    begun = [line.partition("] ")[2] for line in mended.stdout.splitlines() if line.startswith("[")]
    assert begun == names[3:]
    assert mended.stdout.splitlines()[-1] == f"Results are in {out}"
    found = json.loads((out / "search" / "search_result.json").read_text())["final_results"][0]["layers"]
    [grafted, healed] = sorted((out / "checkpoints").iterdir())
    assert grafted.name == "grafted_" + "_".join(map(str, found))
    assert json.loads((grafted / "checkpoint_info.json").read_text())["replaced_layers"] == found
    scores = {model: json.loads((out / "evaluations" / f"{model}.json").read_text())["score"] for model in SCORED}
    lines = mended.stdout.splitlines()
    for letter, name, score in zip("ABC", ("tiny_llamba", grafted.name, healed.name), scores.values(), strict=True):
        assert f"{letter}  {name}" in lines
        assert any(f"{letter}  {score:.3f} ±" in line for line in lines)

    shutil.rmtree(out / "layers")  # the layers are not made again: no step needs them now
    again = run_command("run_experiment", file)
    assert again.returncode == 0, again.stderr
    assert states(again.stdout) == dict.fromkeys(names, "done") | {"extract": "done (removed since)"}
    assert not [line for line in again.stdout.splitlines() if line.startswith(("[", "+"))]
    assert f"A  tiny_llamba\nB  {grafted.name}\n" in again.stdout

    experiment_file(tmp_path, ("limit: 8, models", "limit: 9, models"))  # other questions need no --redo
    told = run_command("run_experiment", file, "--dry_run")
    changed = [*names[4:7], "compare"]
    assert states(told.stdout) == {name: "again" if name in changed else "done" for name in names} | {
        "extract": "done (removed since)"
    }
    assert "again (limit: was 8, is now 9)" in told.stdout

    experiment_file(tmp_path, ("max_steps: 2", "max_steps: 3"))
    before = (healed / "checkpoint_info.json").read_bytes()
    assert_refused(run_command("run_experiment", file), "results of heal with other settings", "--redo", "output_dir")
    assert (healed / "checkpoint_info.json").read_bytes() == before
    redone = run_command("run_experiment", file, "--redo")
    assert redone.returncode == 0, redone.stderr
    begun = [line.partition("] ")[2] for line in redone.stdout.splitlines() if line.startswith("[")]
    assert begun == ["heal", "evaluate healed", "compare"]
    assert f"A  tiny_llamba\nB  {grafted.name}\n" in redone.stdout
    assert json.loads((healed / "checkpoint_info.json").read_text())["healing"]["settings"]["max_steps"] == 3
    assert (out / "experiment.yaml").read_text() == file.read_text()


def is_open(path: Path) -> bool:
    """Whether any process has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == path:
                return True
    return False


SCORED = ("base", "grafted", "healed")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("search:", "serach:", ["line 5: there is no key 'serach'. The nearest is search."]),
        ("limit: 8, method", "limits: 8, method", ["line 5: there is no key 'limits'. The nearest is limit."]),
        ("method: singles", "method: single", ["line 5: method: invalid choice: 'single'", "singles"]),
        ("limit: 8, models", "limit: many, models", ["line 7: limit: 'many' is not an integer"]),
        ("[base, grafted", "[bass, grafted", ["models has 'bass'. The nearest is base."]),
        ("evaluate: {", "evaluate: {overwrite: true, ", ["an experiment takes no overwrite for evaluate"]),
        ("search: {", "search: {output_dir: x, ", ["an experiment takes no output_dir for search"]),
        ("search: {", "search: {start: x, ", ["an experiment takes no start for search"]),
        ("donor: tiny_llama\n", "", ["has no key donor"]),
        ("device: cpu", "device: cpu\nlayers: [4, 10]", ["either layers or search"]),
        ("device: cpu", "device: cpu\ngpu: 0", ["line 4: device cannot be used with gpu"]),
        ("data: ", "eval_data: ", ["line 6: heal has no key data"]),
        ("evaluate: {", "compare: {", ["compare"]),
        ("device: cpu", "device: cpu\nbuild: yes", ["build is 'yes'. Give it keys"]),
        ("device: cpu", "device: cpu\ndevice: cpu", ["line 5: device is there twice"]),
        ("base: ", "- base: ", ["this is not YAML"]),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_line_and_key(old, new, words, tmp_path, monkeypatch):
    file = experiment_file(tmp_path, (old, new))
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", str(file)])
    with pytest.raises(SurgeryError) as refused:
        run_experiment.main()
    for word in (str(file), *words):
        assert word in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiment.yaml"]


@pytest.mark.parametrize("record", ["{", "[]", '{"build": {"asked": 1, "replaces": false}}', '{"build": {}}'])
def test_a_damaged_record_is_named(record, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "experiment.json").write_text(record)
    result = run_command("run_experiment", experiment_file(tmp_path), "--dry_run")
    assert_refused(result, "experiment.json is damaged", "Remove it")


def test_a_base_that_is_needed_only_for_its_scores_is_looked_for_too(tmp_path):
    path = experiment_file(tmp_path, ("base: tiny_llamba", "base: ./gone"))
    experiment = run_experiment.read_experiment(path)
    left = [step for step in run_experiment.plan(experiment) if step.name == "evaluate base"]
    with pytest.raises(SurgeryError, match=r"base: .*gone is not there"):
        run_experiment._check_inputs(experiment, left)


def test_a_checkpoint_of_many_heads_has_a_short_name(tmp_path):
    path = experiment_file(tmp_path)
    experiment = run_experiment.read_experiment(path)
    names = []
    for count in (3, 100, 101):
        many = replace(experiment, layers=[str(layer) for layer in range(count)])
        [build] = [step for step in run_experiment.plan(many) if step.kind == "build"]
        names.append(build.shown.name)
    assert names[0] == "grafted_0_1_2"
    assert all(len(name) < 100 for name in names)
    assert len(set(names)) == 3


def test_heads_that_the_search_finds_are_built(tmp_path, quick_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(quick_python))
    search = "search: {task: [embedded_recall], limit: 2, unit: heads, method: singles, budget_evaluations: 2, "
    (tmp_path / "experiment.yaml").write_text(
        f"base: tiny_llamba\ndonor: tiny_llama\noutput_dir: {tmp_path / 'out'}\ndevice: cpu\n"
        f"{search}race: off, keep_mixer_heads: true}}\n"
    )
    result = run_command("run_experiment", tmp_path / "experiment.yaml")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "search" / "search_result.json").read_text())
    layer, head = found["final_results"][0]["heads"][0].split(":")
    info = json.loads(
        (tmp_path / "out" / "checkpoints" / f"grafted_{layer}-{head}" / "checkpoint_info.json").read_text()
    )
    assert info["grafted_heads"] == {layer: [int(head)]}
    assert info["keep_mixer_heads"] is True
