"""create_best_checkpoints.sh: which lists it reads, what it builds, skips and reports."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model_preparation import create_best_checkpoints as best
from tests.conftest import PACKAGE, assert_refused, run_command, run_fresh_command

SCRIPT = PACKAGE / "create_best_checkpoints.sh"


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that would have been run; each makes a complete checkpoint."""
    ran = []

    def pretend(command):
        ran.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "checkpoint_info.json").touch()
        return 0

    monkeypatch.setattr(best, "_run", pretend)
    return ran


def test_the_default_list_is_the_guides():
    combinations = best.read_list(PACKAGE / "best_combinations.csv")
    assert {(combination.name, combination.score) for combination in combinations} == {
        ("llamba_replaced_11_13_17_21", "0.5700"),
        ("llamba_replaced_13_16_17", "0.6542"),
        ("llamba_replaced_13_17", "0.5544"),
        ("llamba_replaced_17", "0.5144"),
        ("llamba_replaced_14_17", ""),
        ("llamba_replaced_10_14_17_30", ""),
    }


def test_a_list_may_be_csv_or_json(tmp_path):
    rows = 'layers,score,description,name\n13 11,0.5,"two, of mine",mine\n7,,,\n'
    (tmp_path / "list.csv").write_text(rows, encoding="utf-8-sig")
    entries = [{"layers": [13, 11], "score": 0.5, "description": "two, of mine", "name": "mine"}, {"layers": "7"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    expected = [
        best.Combination((11, 13), "0.5", "two, of mine", "mine"),
        best.Combination((7,), "", "", "llamba_replaced_7"),
    ]
    assert best.read_list(tmp_path / "list.csv") == expected
    assert best.read_list(tmp_path / "list.json") == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("list.csv", "layers,score\n1 2,0.5\nx,\n", ["entry 2", "'x' is not a layer index"]),
        ("list.csv", "layers\n1 -2\n", ["entry 1", "'-2'"]),
        ("list.csv", "layers,score\n,0.5\n", ["entry 1", "no layers"]),
        ("list.csv", "layers,mmlu\n1,0.5\n", ["mmlu", "known are"]),
        ("list.csv", "layers\n1,2\n", ["entry 1", "a value without a column", "separated by spaces, not commas"]),
        ("list.csv", 'layers,score\n"1,2,3",0.5\n', ["entry 1", "'1,2,3'", "separated by spaces, not commas"]),
        ("list.csv", "layers,score,name\n11,13,17\n", ["entry 1", "score 13 ", "separated by spaces, not commas"]),
        ("list.csv", "layers,name\n1,../out\n", ["'../out'"]),
        ("list.csv", "layers\n1 2\n2 1\n", ["2 entries", "llamba_replaced_1_2"]),
        ("list.csv", "layers\n", ["no combinations"]),
        ("list.json", "[{", ["cannot be read"]),
        ("list.json", '{"layers": [1]}', ["not a list of objects"]),
        ("list.json", '[{"layers": [true]}]', ["entry 1", "True"]),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_name(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    result = run_command("create_best_checkpoints", "--list", name, cwd=tmp_path)
    assert_refused(result, name, *words)


def test_a_missing_list_is_named(tmp_path):
    result = run_command("create_best_checkpoints", "--list", "none.csv", cwd=tmp_path)
    assert_refused(result, "none.csv cannot be read", "No such file", ".csv or .json", "--help")


@pytest.mark.parametrize("flags", [["--bse", "x"], ["--gpu", "first"], ["--device", "cpu", "--gpu", "0"], ["17"]])
def test_wrong_flags_end_it_before_the_first_row(flags, tmp_path):
    result = run_command("create_best_checkpoints", *flags, "--output_root", tmp_path / "out", cwd=tmp_path)
    assert_refused(result, "create_replaced_model_checkpoint.py: error: ", flags[0], code=2)
    assert "[1/" not in result.stdout


@pytest.mark.parametrize("flag", [["--layers", "1"], ["--output-dir", "x"], ["--score=0.5"]])
def test_flags_that_come_from_the_list_are_a_usage_error(flag, tmp_path):
    assert_refused(run_command("create_best_checkpoints", *flag, cwd=tmp_path), "comes from the list", code=2)


def test_other_flags_are_passed_on_and_the_complete_is_skipped(commands, tmp_path):
    combinations = [best.Combination((1, 2), "0.5", "-odd-", "a"), best.Combination((3,), "", "", "b")]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint_info.json").touch()
    outcomes = best.build_all(combinations, tmp_path, ["--base", "my base", "--gpu", "1"])
    assert [outcome.status for outcome in outcomes] == ["built", "skipped"]
    [command] = commands
    assert command[1:] == [
        str(PACKAGE / "create_replaced_model_checkpoint.py"),
        *["--layers", "1", "2", "--output_dir", str(tmp_path / "a"), "--description=-odd-", "--score=0.5"],
        *["--base", "my base", "--gpu", "1"],
    ]


def test_overwrite_skips_nothing(commands, tmp_path):
    outcomes = best.build_all([best.Combination((3,), "", "", "b")], tmp_path, ["--overwrite"])
    assert [outcome.status for outcome in outcomes] == ["built"]
    assert len(commands) == 1


def test_an_unfinished_folder_is_not_skipped(commands, tmp_path):
    (tmp_path / "b.partial").mkdir()
    assert best.build_all([best.Combination((3,), "", "", "b")], tmp_path, [])[0].status == "built"


def test_an_interruption_ends_the_command_running_and_lets_it_clean_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), pathlib.Path('cleaned').touch(), sys.exit(143)))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "signal.pause()\n"
    )
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            best._run([sys.executable, "-c", child])
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (tmp_path / "cleaned").exists()


def test_the_script_builds_a_list_to_its_end_and_reports(base_dir, layers_dir, checkpoint_dir, tmp_path):
    (tmp_path / "list.csv").write_text("layers,score,description,name\n99,,,\n2,,,\n3 0,0.25,a pair,pair\n")
    shutil.copytree(checkpoint_dir, tmp_path / "out" / "llamba_replaced_2")
    command = ["bash", SCRIPT, "--list", "list.csv", "--output_root", "out", "--base", base_dir]
    result = subprocess.run(
        [*command, "--llama_layers_dir", layers_dir, "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert_refused(result, "Layer 99 is out of range", "1 of 3 checkpoints failed")
    rows = [line.split() for line in result.stdout.splitlines()[-4:]]
    assert rows[0] == ["name", "layers", "status", "seconds", "path"]
    assert [(row[0], row[-3], row[-1]) for row in rows[1:]] == [
        ("llamba_replaced_99", "failed", "out/llamba_replaced_99"),
        ("llamba_replaced_2", "skipped", "out/llamba_replaced_2"),
        ("pair", "built", "out/pair"),
    ]
    info = json.loads((tmp_path / "out" / "pair" / "checkpoint_info.json").read_text())
    assert (info["replaced_layers"], info["mmlu_score"], info["description"]) == ([0, 3], 0.25, "a pair")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"llamba_replaced_2", "pair"}


def test_help_needs_no_torch_and_shows_what_a_list_looks_like():
    result = run_fresh_command("create_best_checkpoints", "--help")
    assert result.returncode == 0
    assert "layers,score,description" in result.stdout
