"""evaluate_checkpoints.py: its command line, what it hands on, and that only --ray needs Ray."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from model_preparation import evaluate_checkpoints
from model_preparation.errors import SurgeryError
from model_preparation.jobs import evaluate_many
from tests.conftest import HANG_SECONDS, PACKAGE, assert_refused, run_command
from tests.jobs.conftest import FAKE_EVALUATOR


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command here, with the stand-in for the evaluator, and return what it prints."""

    def run(*args):
        monkeypatch.setattr(evaluate_many.evaluate_all, "__kwdefaults__", DEFAULTS | {"evaluator": FAKE_EVALUATOR})
        monkeypatch.setattr(sys, "argv", ["evaluate_checkpoints.py", *map(str, args)])
        evaluate_checkpoints.main()
        return capsys.readouterr().out

    return run


DEFAULTS = dict(evaluate_many.evaluate_all.__kwdefaults__)


def test_a_list_and_its_flags_are_evaluated(command, make_candidate, tmp_path):
    make_candidate("llamba_replaced_1_3")
    (tmp_path / "list.csv").write_text("layers\n1 3\n")
    out = command("--list", tmp_path / "list.csv", "--output_root", tmp_path / "checkpoints", "--limit", 2)
    row = out.splitlines()[-2].split()
    assert (row[0], row[-3], row[-1]) == ("llamba_replaced_1_3", "10", "evaluated")
    assert "--limit 2 is per subject" in out.splitlines()[-1]


def test_a_failure_is_told_at_the_end(command, make_candidate, tmp_path):
    make_candidate("good")
    make_candidate("bad", behaviour="fail")
    with pytest.raises(SurgeryError, match="1 of 2 evaluations failed"):
        command(tmp_path / "checkpoints")


def test_flags_are_handed_on_as_they_are():
    given = ["x", "--tasks", "arc", "--batch-size", "auto", "--num_fewshot", "5", "--dtype", "float32", "--seed", "3"]
    parser = evaluate_checkpoints.make_parser()
    args = parser.parse_args([*given, "--mmlu_data", "hub", "--device", "cpu"])
    assert " ".join(evaluate_checkpoints._flags(parser, args)) == (
        "--tasks arc --mmlu_data hub --num_fewshot 5 --batch_size auto --seed 3 --dtype float32 --device cpu"
    )
    assert list(evaluate_checkpoints._needed_paths(args)) == []
    given = ["x", "--suite", "recall", "--lengths", "64", "128", "--allow_truncation"]
    given += ["--haystack", "/book", "--task_data", "fda=/fda", "swde=/swde"]
    parser = evaluate_checkpoints.make_parser()
    args = parser.parse_args(given)
    assert " ".join(evaluate_checkpoints._flags(parser, args)) == (
        "--suite recall --lengths 64 128 --haystack /book --task_data fda=/fda swde=/swde --allow_truncation"
    )
    assert list(map(str, evaluate_checkpoints._needed_paths(args))) == ["/fda", "/swde", "/book"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give checkpoints' folders or --list FILE"),
        (["x", "--list", "y"], "not both"),
        (["--tasks", "arc_easy", "/"], "/ was taken as a task: put folders before --tasks"),
        (["x", "--limit", "0"], "0 is too small"),
        (["x", "--batch_size", "big"], "'big' is not an integer"),
        (["x", "--cpus_per_job", "2"], "belongs to --ray"),
        (["x", "--output_root", "y"], "--output_root belongs to --list"),
        (["x", "--ray", "local", "--device", "cuda:1"], "each job gets a GPU from Ray"),
        (["x", "--full_eval"], "--full_eval"),
    ],
)
def test_wrong_usage_exits_with_2(flags, words):
    assert_refused(run_command("evaluate_checkpoints", *flags), words, code=2)


def test_the_script_finds_its_python_and_names_a_folder_that_is_not_there(quick_python, tmp_path):
    result = subprocess.run(
        ["bash", PACKAGE.parent / "scripts" / "evaluate_all.sh", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(quick_python)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert_refused(result, "nowhere is not there")


@pytest.mark.parametrize("script", ["scripts/evaluate_all.sh", "model_preparation/create_best_checkpoints.sh"])
def test_without_an_environment_the_scripts_say_what_makes_one(script, tmp_path):
    for name in (script, "model_preparation/find_python.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PACKAGE.parent / name, tmp_path / name)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    result = subprocess.run(
        ["bash", tmp_path / script, "x"], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert_refused(result, "there is no .venv", "scripts/quickstart.sh")


@pytest.mark.parametrize("name", ["evaluate_checkpoints", "create_best_checkpoints"])
def test_without_ray_installed_only_the_flag_fails(name, make_candidate, quick_python, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('made impossible')\n")
    folder = make_candidate("mine")
    (tmp_path / "other.csv").write_text("layers,name\n2,mine\n")  # fails, as the folder is of other layers
    (tmp_path / "new.csv").write_text("layers,name\n1 3,mine\n2,new\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy\n"
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def run(*args: str) -> subprocess.CompletedProcess:
        command = [quick_python, "-c", code, str(tmp_path), str(PACKAGE / f"{name}.py"), *args]
        command += ["--output_root", str(folder.parent)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)

    assert_refused(run("--list", "other.csv"), "1 of 1")
    assert_refused(run("--list", "new.csv", "--ray", "local"), "made impossible", "pip install 'ray", "leave --ray out")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.0.0.1", "none of auto, local and HOST:PORT"),
        ("ray://10.0.0.1:10001", "none of auto, local and HOST:PORT"),
        ("127.0.0.1:PORT", "Nothing answers at --ray 127.0.0.1:"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_at_once(address, words, make_candidate):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, but nobody listens
        address = address.replace("PORT", str(free.getsockname()[1]))
        result = run_command("evaluate_checkpoints", make_candidate("one"), "--ray", address)
    assert_refused(result, words)
