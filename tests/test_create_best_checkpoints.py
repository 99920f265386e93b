"""create_best_checkpoints.sh: which lists it reads, what it builds, skips and reports.

Real builds from a list are in tests/jobs/test_ray_jobs.py and, one after the other, in tests/test_readme.py.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from model_preparation import create_replaced_model_checkpoint
from model_preparation.jobs.build_many import BUILDER, build_all, describe
from model_preparation.jobs.combinations import Combination, read_list
from model_preparation.jobs.jobs import Ended
from tests.conftest import HANG_SECONDS, PACKAGE, assert_refused, run_command, run_fresh_command

SCRIPT = PACKAGE / "create_best_checkpoints.sh"
ARGUMENTS_ONLY = """\
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
if "99" in sys.argv:
    sys.exit("error: Layer 99 is out of range. Choose another.")
folder.mkdir(parents=True)
(folder / "arguments.json").write_text(json.dumps(sys.argv[1:]))
"""


@pytest.fixture
def builder(tmp_path) -> Path:
    """A builder that fails for layer 99, and else writes down only how it was called."""
    path = tmp_path / "builder.py"
    path.write_text(ARGUMENTS_ONLY)
    return path


def flags(*given: str):
    """The builder's flags: the list to pass on, and how the builder parses them."""
    parser = create_replaced_model_checkpoint.make_parser()
    return list(given), parser.parse_args(["--layers", "0", "--output_dir", "DIR", *given])


def build(combinations, output_root, *given, **options):
    return build_all(combinations, output_root, *flags(*map(str, given)), **options)


def test_the_default_list_is_the_guides():
    combinations = read_list(PACKAGE / "best_combinations.csv")
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
        Combination((11, 13), "0.5", "two, of mine", "mine"),
        Combination((7,), "", "", "llamba_replaced_7"),
    ]
    assert read_list(tmp_path / "list.csv") == expected
    assert read_list(tmp_path / "list.json") == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("list.csv", "layers,score\n1 2,0.5\nx,\n", ["entry 2", "'x' is not a layer index"]),
        ("list.csv", "layers\n1 -2\n", ["entry 1", "'-2'"]),
        ("list.csv", "layers,score\n,0.5\n", ["entry 1", "no layers"]),
        ("list.csv", "layers,mmlu\n1,0.5\n", ["mmlu", "known are"]),
        ("list.csv", "layers\n1,2\n", ["entry 1", "more values than columns", "separated by spaces, not commas"]),
        ("list.csv", 'layers,score\n"1,2,3",0.5\n', ["entry 1", "'1,2,3'", "separated by spaces, not commas"]),
        ("list.csv", "layers,score,name\n11,13,17\n", ["entry 1", "score 13 ", "separated by spaces, not commas"]),
        ("list.csv", "layers,name\n1,../out\n", ["'../out'"]),
        ("list.csv", "layers\n1 2\n2 1\n", ["2 entries", "llamba_replaced_1_2"]),
        ("list.csv", "layers\n", ["no combinations"]),
        ("list.csv", "11 13\n4 5\n", ["first line must name the columns (one is layers), but it is '11 13'"]),
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
    assert_refused(
        result, "none.csv cannot be read", "No such file", ".csv or .json", "create_best_checkpoints.sh --help"
    )


@pytest.mark.parametrize("flags", [["--bse", "x"], ["--gpu", "first"], ["--device", "cpu", "--gpu", "0"], ["17"]])
def test_wrong_flags_end_it_before_the_first_row(flags, tmp_path):
    result = run_command("create_best_checkpoints", *flags, "--output_root", tmp_path / "out", cwd=tmp_path)
    assert_refused(result, "create_replaced_model_checkpoint.py: error: ", flags[0], code=2)
    assert "[1/" not in result.stdout


@pytest.mark.parametrize("flag", [["--layers", "1"], ["--output-dir", "x"], ["--score=0.5"], ["--from_info", "x"]])
def test_flags_that_come_from_the_list_are_a_usage_error(flag, tmp_path):
    assert_refused(run_command("create_best_checkpoints", *flag, cwd=tmp_path), "decides what to build", code=2)


def test_rows_are_built_skipped_and_failed(builder, checkpoint_dir, base_dir, layers_dir, tmp_path, capsys):
    combinations = [
        Combination((99,), "", "", "bad"),
        Combination((1, 3), "0.5", "a tiny pair", checkpoint_dir.name),
        Combination((1, 2), "0.5", "-odd-", "new"),
    ]
    root = shutil.copytree(checkpoint_dir, tmp_path / "out" / checkpoint_dir.name).parent
    given = ("--base", base_dir, "--llama_layers_dir", layers_dir, "--gpu", "1")
    outcomes = build(combinations, root, *given, builder=builder)
    assert [outcome.status for outcome in outcomes] == ["failed", "skipped", "built"]
    assert json.loads((root / "new" / "arguments.json").read_text()) == [
        *["--layers", "1", "2", "--output_dir", str(root / "new"), "--description=-odd-", "--score=0.5"],
        *map(str, given),
    ]
    assert "error: Layer 99 is out of range" in capsys.readouterr().err
    heading, *rows = describe(outcomes).splitlines()
    assert heading.split() == ["name", "layers", "status", "seconds", "path", "note"]
    assert [row.split()[0] for row in rows] == ["bad", checkpoint_dir.name, "new"]
    assert rows[0].endswith("Layer 99 is out of range. Choose another.")
    assert rows[1].endswith("its score is None, but 0.5 in the list")
    assert rows[2].endswith(str(root / "new"))


def run_nothing(jobs):
    return iter([(index, Ended("", 1.0)) for index in range(len(jobs))])


def test_a_checkpoint_that_cannot_be_read_is_failed_with_one_advice(checkpoint_dir, tmp_path, capsys):
    folder = shutil.copytree(checkpoint_dir, tmp_path / "pair")
    (folder / "checkpoint_info.json").write_text("[]")
    [outcome] = build([Combination((1, 3), "", "", "pair")], tmp_path, run_jobs=run_nothing)
    assert outcome.status == "failed"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder / 'checkpoint_info.json'} cannot be read (")
    assert line.endswith("). Build the checkpoint again. Replace it with --overwrite, or choose another --output_root.")


def test_overwrite_skips_nothing(checkpoint_dir):
    combination = Combination((1, 3), "", "", checkpoint_dir.name)
    outcomes = build([combination], checkpoint_dir.parent, "--overwrite", run_jobs=run_nothing)
    assert [outcome.status for outcome in outcomes] == ["built"]


def test_a_dry_run_builds_nothing_and_says_checked(tmp_path):
    outcomes = build([Combination((3,), "", "", "b")], tmp_path, "--dry_run", run_jobs=run_nothing)
    assert [outcome.status for outcome in outcomes] == ["checked"]


def test_an_unfinished_folder_is_not_skipped(tmp_path):
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b").mkdir()
    [outcome] = build([Combination((3,), "", "", "b")], tmp_path, run_jobs=run_nothing)
    assert outcome.status == "built"


def test_the_command_it_runs_is_the_builder(tmp_path):
    jobs = []
    build([Combination((3,), "", "", "b")], tmp_path, run_jobs=lambda given: jobs.extend(given) or run_nothing(given))
    assert [job.script for job in jobs] == [BUILDER]
    assert BUILDER == PACKAGE / "create_replaced_model_checkpoint.py"


def test_the_script_ends_with_1_if_a_checkpoint_is_not_the_one_listed(checkpoint_dir, quick_python, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"layers": [2], "name": checkpoint_dir.name}]))
    result = subprocess.run(
        ["bash", SCRIPT, "--list", "list.json", "--output_root", checkpoint_dir.parent],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(quick_python)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert_refused(result, "layers: was 1 3, is now 2", "--overwrite", "--output_root", "1 of 1 checkpoints failed")


def test_help_needs_no_torch_and_shows_what_a_list_looks_like():
    result = run_fresh_command("create_best_checkpoints", "--help")
    assert result.returncode == 0
    assert "layers,score,description" in result.stdout
    assert "shared file system" in result.stdout


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--cpus_per_job", "2"], "belongs to --ray"),
        (["--ray", "local", "--gpu", "1"], "each job gets a GPU from Ray"),
        (["--ray", "local", "--cpus_per_job", "0"], "0 is too small"),
    ],
)
def test_flags_of_ray_that_go_against_each_other_are_a_usage_error(given, words, tmp_path):
    assert_refused(run_command("create_best_checkpoints", *given, cwd=tmp_path), words, code=2)
