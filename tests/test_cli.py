"""What all commands share: `layer-surgery` and its subcommands, --help, --config."""

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

import model_preparation
from model_preparation.chinese_help import CATALOGUE, translate
from model_preparation.command_line import CommandParser
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.settings import EvaluationSettings, GenerationSettings
from model_preparation.layer_surgery import SUBCOMMANDS, show_subcommands
from model_preparation.search import report
from model_preparation.search.settings import SearchSettings
from model_preparation.train.distill.settings import DistillSettings
from model_preparation.train.heal.settings import HealSettings
from tests.conftest import PACKAGE, assert_refused, run_command, run_python

# Runs command lines one after the other, and prints what each printed, and what was imported by then.
RUN_ALL = """
import contextlib, io, json, runpy, sys
printed = []
for sys.argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    printed.append(out.getvalue())
place = sys.modules["model_preparation"].__file__
print(json.dumps({"printed": printed, "imported": sorted(sys.modules), "place": place}))
"""
SLOW = {"torch", "transformers", "numpy", "yaml", "requests"}


def run_all(lines: list[list[str]], cwd: Path, **env: str) -> dict:
    result = run_python("-c", RUN_ALL, json.dumps(lines), cwd=cwd, **env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_help_is_quick_where_the_package_is_a_copy_elsewhere(tmp_path):
    """The package is a copy, as after `pip install`. The scripts start from a checkout."""
    copy = tmp_path / "site"
    shutil.copytree(PACKAGE, copy / "model_preparation", ignore=shutil.ignore_patterns("embedded", "__pycache__"))
    cli = str(PACKAGE / "layer_surgery.py")
    lines = [[str(PACKAGE / f"{each.module}.py"), "--help"] for each in SUBCOMMANDS.values()]
    lines += [[cli, name, "--help"] for name in SUBCOMMANDS]
    found = run_all(lines, tmp_path, PYTHONPATH=str(copy), LANG="C")
    assert found["place"] == str(copy / "model_preparation" / "__init__.py")
    assert SLOW.intersection(found["imported"]) == set()
    for line, text in zip(lines, found["printed"], strict=True):
        typed = Path(line[0]).name + (f" {line[1]}" if line[0] == cli else "")
        assert text.startswith(f"usage: {typed} "), text[:200]


def test_every_command_is_a_subcommand():
    scripts = {path.stem for path in PACKAGE.glob("*.py") if "\nif __name__ == " in path.read_text()}
    assert scripts - {"layer_surgery"} == {each.module for each in SUBCOMMANDS.values()}


def test_the_subcommands_are_listed_and_a_misspelt_one_is_answered_with_the_nearest():
    alone, asked = run_command("layer_surgery"), run_command("layer_surgery", "--help")
    assert alone.returncode == asked.returncode == 0
    assert alone.stdout == asked.stdout
    for name, each in SUBCOMMANDS.items():
        assert f"  {name:<10} {each.summary}\n" in alone.stdout
    version = run_command("layer_surgery", "--version").stdout
    assert version == f"layer-surgery {model_preparation.__version__}\n"
    for given, nearest in [
        ("biuld", "The nearest is build."),
        ("extract_layers.py", "That is extract."),
        ("", "--help"),
    ]:
        assert_refused(run_command("layer_surgery", given), f"no subcommand {given!r}", nearest, code=2)


@pytest.mark.parametrize(
    ("subcommand", "args"),
    [
        ("inspect", ["tiny_llamba", "--keys", "lm_head*", "--json"]),  # works
        ("verify", ["nowhere"]),  # is refused
        ("build", ["--layers", "4", "--gpu", "many", "--output_dir", "x"]),  # is wrong usage
        ("clean", ["--dir", "."]),
    ],
)
def test_a_subcommand_does_what_its_script_does(subcommand, args, tmp_path):
    script = SUBCOMMANDS[subcommand].module
    direct = run_command(script, *args, cwd=tmp_path)
    found = run_command("layer_surgery", subcommand, *args, cwd=tmp_path)
    assert found.returncode == direct.returncode
    assert found.stdout == direct.stdout
    # The usage has the name that was typed, so its lines break elsewhere.
    ours = found.stderr.replace(f"layer_surgery.py {subcommand}", "NAME").replace("layer_surgery.py build", "BUILDER")
    theirs = direct.stderr.replace(f"{script}.py", "NAME").replace("create_replaced_model_checkpoint.py", "BUILDER")
    assert ours.split() == theirs.split()


def write_config(folder: Path, **values: object) -> Path:
    (folder / "flags.yaml").write_text(yaml.safe_dump(values))
    return folder / "flags.yaml"


def run_with_config(name: str, folder: Path, *more: object, **values: object) -> None:
    result = run_command(name, "--config", write_config(folder, **values), *more, cwd=folder)
    assert result.returncode == 0, result.stderr


def test_an_evaluation_from_a_file_is_that_of_the_flags(checkpoint_dir, tmp_path):
    values = {"full_eval": True, "skip-generation": True, "tasks": "embedded_recall", "batch_size": 2, "device": "cpu"}
    values |= {"checkpoint": "tiny_llamba", "results_dir": "results", "limit": 3, "result_json": "result.json"}
    run_with_config("test_checkpoint", tmp_path, "--limit", 2, **values)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["questions"], result["settings"]["batch_size"], result["kept"]) == (2, 2, False)
    used = tmp_path / result["results_dir"] / "config.yaml"
    values |= {"limit": 2, "skip_generation": values.pop("skip-generation"), "tasks": ["embedded_recall"]}
    assert yaml.safe_load(used.read_text()).items() >= {**values, "seed": 1234, "parallelize": False}.items()
    # The saved file gives the same result.
    again = run_command("test_checkpoint", "--config", used, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "--limit 2 is per task" in again.stdout
    assert json.loads((tmp_path / "result.json").read_text()) == {**result, "kept": True}


def test_a_search_a_healing_and_a_distillation_take_files_and_keep_all_that_was_used(
    checkpoint_dir, tmp_path, monkeypatch
):
    def kept(place: str, *, given: dict, **others: object) -> None:
        """The file has what was given, and the defaults too."""
        assert yaml.safe_load((tmp_path / place).read_text()).items() >= {**given, **others}.items()

    monkeypatch.setattr(report, "PLOTS", {})  # plots take most of the time of a small search
    (tmp_path / "text.txt").write_text("Mia likes quinces . Rosa likes eggs . " * 50)
    search = {"base": "tiny_llamba", "donor": "tiny_llama", "task": ["embedded_recall"], "limit": 2, "race": "off"}
    search |= {"method": "singles", "budget_evaluations": 1, "output_dir": "found", "device": "cpu"}
    run_with_config("search_layers", tmp_path, **search)
    kept("found/config.yaml", given=search, objective="accuracy", top=10, boundary_memory="4.0")
    first = json.loads((tmp_path / "found" / "search_result.json").read_text())
    again = run_command("search_layers", "--config", "found/config.yaml", "--output_dir", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "again" / "search_result.json").read_text())
    assert (found["search"], found["final_results"]) == (first["search"], first["final_results"])

    heal = {"checkpoint": str(checkpoint_dir), "data": "text.txt", "max_steps": 2, "block_size": 16, "device": "cpu"}
    heal |= {"eval_interval": 1, "always_save": "no", "milestones": ["1=first"], "learning_rate": "1e-4"}
    run_with_config("heal_checkpoint", tmp_path, "--output_dir", "healed", **heal)
    heal["learning_rate"] = "0.0001"
    kept("healed.config.yaml", given=heal, output_dir="healed", batch_size=4, load_best="yes", compile=False)
    assert (tmp_path / "healed_resume" / "first").is_dir()
    # A resumed run takes the settings of the first run. Its config file holds them, and gives the same bytes.
    resumed = {"checkpoint": str(checkpoint_dir), "data": "text.txt", "device": "cpu", "output_dir": "resumed"}
    run_with_config("heal_checkpoint", tmp_path, "--resume", "healed_resume/first", **resumed)
    kept("resumed.config.yaml", given=resumed, max_steps=2, block_size=16, always_save="no")
    again = run_command("heal_checkpoint", "--config", "resumed.config.yaml", "--output_dir", "anew", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / name / "model_state_dict.pt").read_bytes() for name in ("healed", "resumed", "anew")]
    assert weights[0] == weights[1] == weights[2]

    distill = {"donor": "tiny_llama", "data": "text.txt", "tokens": 64, "sequence_length": 16, "steps_per_layer": 1}
    distill |= {"layers": [3, 1], "batch_size": 1, "output_dir": "base", "device": "cpu"}
    run_with_config("distill_llamba_base", tmp_path, **distill)
    kept("base/config.yaml", given=distill, target="mixer", memory_limit="4.0", restart=False)
    assert json.loads((tmp_path / "base" / "distillation.json").read_text())["settings"]["tokens"] == 64


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        (EvaluationSettings, {"limit": 0}, "limit is 0: 0 is too small; it must be at least 1"),
        (EvaluationSettings, {"batch_size": "many"}, "batch_size is 'many': 'many' is not an integer"),
        (EvaluationSettings, {"batch_size": None}, "batch_size is None: 'None' is not an integer"),
        (GenerationSettings, {"top_p": 1.5}, "top_p is 1.5: 1.5 is too large; it must be at most 1"),
        (SearchSettings, {"population": 3}, "population is 3: 3 is too small; it must be at least 4"),
        (SearchSettings, {"method": "best"}, "method is 'best'. Choose one of singles, exhaustive, greedy, beam, ga"),
        (SearchSettings, {"race": "on"}, "race is the text 'on'. Give True"),
        (SearchSettings, {"memory_bytes": -1}, "memory_bytes is -1: -1e-09 is too small"),
        (HealSettings, {"warmup": 2.0}, "warmup is 2.0: 2.0 is too large; it must be at most 1"),
        (HealSettings, {"max_steps": "5"}, "max_steps is the text '5'. Give 5"),
        (HealSettings, {"compile": "no"}, "compile is the text 'no'. Give False"),
        (HealSettings, {"load_best": 3}, "load_best is 3. Choose one of yes, no"),
        (DistillSettings, {"tokens": 1}, "tokens is 1: 1 is too small; it must be at least 2"),
        (DistillSettings, {"learning_rate": float("nan")}, "learning_rate is nan: nan is not finite"),
    ],
)
def test_python_refuses_what_flags_refuse(settings, given, words):
    place = {"output_dir": "."} if settings is SearchSettings else {}
    with pytest.raises(SurgeryError, match=re.escape(words)):
        settings(**place, **given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chekpoint: x", ["line 1: there is no key 'chekpoint'. The nearest is checkpoint."]),
        ("checkpoint: x\nlimit: many", ["line 2: limit: 'many' is not an integer"]),
        ("limit: [1, 2]", ["line 1: limit is a list. Give one value."]),
        ("limit:", ["line 1: limit has no value"]),
        ("limit: {of: 1}", ["line 1: limit has keys in it"]),
        ("tasks: []", ["line 1: tasks is an empty list"]),
        ("tasks: [[mmlu]]", ["line 1: tasks has a list with lists"]),
        ("full_eval: maybe", ["line 1: full_eval is 'maybe'. Give true or false."]),
        ("dtype: float", ["line 1: dtype: invalid choice: 'float'", "float32"]),
        ("limit: 1\nlimit: 2", ["line 2: limit is there twice"]),
        ("gpu: 0\ndevice: cpu", ["line 2: device cannot be used with gpu"]),
        ("source: [llama=/x, llama=/y]", ["line 1: source: llama is given more than once"]),
        ("config: other.yaml", ["there is no key 'config'"]),
        ("checkpoint", ["line 1: keys with values are needed"]),
        ("a: [b", ["line 1: this is not YAML"]),
        ("a: &a\n  b: *a", ["a"]),
    ],
)
def test_a_file_of_flags_that_cannot_be_used_is_named_with_line_and_key(text, words, tmp_path):
    (tmp_path / "flags.yaml").write_text(text)
    assert_refused(run_command("test_checkpoint", "--config", tmp_path / "flags.yaml"), "flags.yaml", *words)


def test_a_missing_file_of_flags_and_flags_that_win(tmp_path):
    assert_refused(run_command("test_checkpoint", "--config", "none.yaml"), "none.yaml cannot be read")
    assert_refused(run_command("test_checkpoint", "--config"), "--config: expected one argument", code=2)
    config = write_config(tmp_path, checkpoint="nowhere", gpu=99, compare_with=["base"], limit=5)
    # --device wins over the file's gpu. The file's limit needs --full_eval, as --limit does.
    result = run_command("test_checkpoint", "--config", config, "--device", "cpu")
    assert_refused(result, "--limit belongs to --full_eval", code=2)
    result = run_command(
        "test_checkpoint", "--config", config, "--device", "cpu", "--full_eval", "--checkpoint", "gone"
    )
    assert_refused(result, "'gone' is neither")


IN_CHINESE = (
    *("extract_layers", "create_replaced_model_checkpoint", "test_checkpoint", "create_best_checkpoints"),
    *("share_checkpoint", "layer_surgery"),
)
HAN = re.compile("[\u4e00-\u9fff]")
# What a translation keeps as it is: flags, placeholders, names of variables.
KEPT = re.compile(r"--\w+|%\(\w+\)s|\b[A-Z]+_[A-Z_]+")


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> CommandParser:
    """The parser that a command makes."""

    class Parsed(Exception):
        pass

    def stop(parser: CommandParser, *_: object) -> None:
        raise Parsed(parser)

    monkeypatch.setattr(sys, "argv", [f"{command}.py"])
    monkeypatch.setattr(CommandParser, "parse_known_args", stop)
    module = importlib.import_module(f"model_preparation.{command}")
    with pytest.raises(Parsed) as parsed:
        module.show_subcommands() if command == "layer_surgery" else module.main()
    return parsed.value.args[0]


@pytest.mark.parametrize("command", IN_CHINESE)
def test_every_help_text_has_a_chinese_translation(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    texts = yaml.safe_load(CATALOGUE.read_text())
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert texts[command].keys() - {"description", "epilog"} <= flags

    actions = {action.option_strings[-1]: action.help for action in parser._actions}
    english = {**actions, "description": parser.description, "epilog": parser.epilog}
    translate(parser, command)
    actions = {action.option_strings[-1]: action.help for action in parser._actions}
    for name, text in {**actions, "description": parser.description, "epilog": parser.epilog}.items():
        assert HAN.search(text), name
        assert set(KEPT.findall(english[name])) <= set(KEPT.findall(text)), name
    # A folded line in the YAML would leave a space.
    assert not re.search(r"[^\x00-\x7f] [^\x00-\x7f]", argparse.ArgumentParser.format_help(parser))
    examples = re.findall("^  .*$", english["epilog"], re.MULTILINE)
    shown = re.findall("^  .*$", parser.epilog, re.MULTILINE)
    if command == "layer_surgery":
        assert [line.split()[0] for line in shown] == list(SUBCOMMANDS)
    else:
        assert shown == examples


@pytest.mark.parametrize(
    ("env", "is_chinese"),
    [
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, True),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, False),
        ({"LANG": "C"}, False),
    ],
)
def test_help_follows_the_language_of_the_environment(env, is_chinese, tmp_path):
    found = run_command("extract_layers", "--help", **{"LC_ALL": "", "LC_MESSAGES": "", "LANG": "", **env})
    assert (found.returncode, bool(HAN.search(found.stdout))) == (0, is_chinese)
    columns = max(sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in line) for line in flag_lines(found))
    assert columns <= 82  # a comma or full stop may stand beyond the edge


def test_the_installed_command_s_help_is_chinese_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/layer-surgery", "--help"])
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    with pytest.raises(SystemExit):
        show_subcommands()
    assert HAN.search(capsys.readouterr().out)


def flag_lines(found: subprocess.CompletedProcess) -> list[str]:
    """The lines that say what flags do."""
    return [line for line in found.stdout.splitlines() if line.startswith(" " * 24)]
