"""Text as Windows' editors save it, in everything that reads text: a byte-order mark and CRLF change nothing."""

import codecs
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from model_preparation.checkpoint.rebuild import read_recipe
from model_preparation.checkpoint.share import _read_card_file
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.mmlu_questions import read_split
from model_preparation.evaluation.prompt_files import read_prompts
from model_preparation.evaluation.tasks import check_names, load_tasks
from model_preparation.io.text import open_text
from model_preparation.jobs.combinations import best_of, read_list
from model_preparation.search.result_reader import read_heads, read_single_layers
from model_preparation.train.distill.tokens import tokens_of_text
from model_preparation.train.heal.sequences import load_sequences
from model_preparation.train.heal.settings import HealSettings
from tests.conftest import make_tokenizer

ROWS = '{"text": "Noah likes melons, née ½."}\n\n{"text": "Mia likes dates."}\n'
PROSE = "Noah likes melons, née ½.\nMia likes dates.\n"
RESULT = json.dumps({"final_results": [{"layers": [3], "fitness": 0.5}], "single_layer_results": {"3": 0.5}}, indent=1)
FIELDS = ("replaced_layers", "total_layers", "config", "generation_config", "files")
RECIPE = json.dumps(dict(zip(("format_version", *FIELDS), (1, [1], 4, {}, {}, {}), strict=True)), indent=1)
QUESTION = {"question": "Who?", "choices": ["Noah", "Mia", "Leo", "Jan"], "answer": 2}


def tokens(path: Path) -> list:
    return tokens_of_text([path], make_tokenizer(), 4, 1000, lambda count: None).tolist()


def sequences(path: Path) -> list:
    return load_sequences(str(path), make_tokenizer(), HealSettings(block_size=4), print).tokens.tolist()


def subject_of(layout: str) -> Callable[[Path], Any]:
    return lambda path: list(read_split(path.parents[layout.count("/")], "anatomy", "test"))


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "--prompts_file p.txt": ("p.txt", PROSE, read_prompts),
    "--prompts_file p.jsonl": ("p.jsonl", '{"prompt": "Noah likes"}\n"Mia"\n', read_prompts),
    "--prompts_file p.json": ("p.json", '["Noah likes",\n "Mia likes"]\n', read_prompts),
    "distil --data d.txt": ("d.txt", PROSE, tokens),
    "distil --data d.jsonl": ("d.jsonl", ROWS, tokens),
    "heal --data h.txt": ("h.txt", PROSE, sequences),
    "heal --data h.md": ("h.md", PROSE, sequences),
    "heal --data h.jsonl": ("h.jsonl", ROWS, sequences),
    "--list l.csv": ("l.csv", 'layers,description\n1 3,"two, née"\n2,\n', read_list),
    "--list l.json": ("l.json", '[{"layers": [1, 3],\n "name": "a"}]\n', read_list),
    "--from result.json": ("result.json", RESULT, lambda path: best_of(path, 1)),
    "--prior result.json": ("result.json", RESULT, read_single_layers),
    "--prior heads.txt": ("heads.txt", "13:16  # née\n15:11\n", read_heads),
    "--from_info checkpoint_info.json": ("checkpoint_info.json", RECIPE, read_recipe),
    "--card card.md": ("card.md", "---\nlicense: mit\n---\n# Née\n", _read_card_file),
    "--mmlu_data of csv": ("test/anatomy_test.csv", '"Who, née?",Noah,Mia,Leo,Jan,C\n', subject_of("a/b")),
    "--mmlu_data of jsonl": ("anatomy/test.jsonl", json.dumps(QUESTION) + "\n", subject_of("a/b")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_mark_and_crlf_change_nothing_and_utf_16_is_named(reader, tmp_path):
    name, text, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
    plain = read(path)
    assert plain
    for content in (codecs.BOM_UTF8 + text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig")):
        path.write_bytes(content)
        assert read(path) == plain
    for coded in (text.encode("utf-16"), text.encode("utf-16-be"), text.encode("utf-16-le"), text.encode("utf-32")):
        path.write_bytes(coded)
        with pytest.raises(SurgeryError, match=rf"{path.name}.* is UTF-(16|32) text, .*; save it as UTF-8"):
            read(path)


@pytest.mark.parametrize("reader", READERS)
def test_what_would_be_waited_for_or_never_ends_is_named(reader, tmp_path):
    name, _, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(path)
        with pytest.raises(SurgeryError, match=r"a FIFO|a device|is not there|has no anatomy"):
            read(path)
        path.unlink()


def test_the_output_of_another_command_is_read_as_a_file(tmp_path):
    lines = b"layers,description\n1 3,two\n"
    (tmp_path / "l.csv").write_bytes(lines)
    reading, writing = os.pipe()
    os.write(writing, lines)
    os.close(writing)
    assert read_list(Path(f"/dev/fd/{reading}")) == read_list(tmp_path / "l.csv")
    os.close(reading)


def test_a_task_of_ones_own_is_found_and_read_with_the_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = json.dumps({"q": "Noah likes", "c": ["melons", "dates"], "a": 1})
    (tmp_path / "rows.jsonl").write_bytes(f"{row}\r\n{row}\r\n".encode("utf-8-sig"))
    definition = (
        f"task: marked_words\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/rows.jsonl}}\n"
    )
    definition += "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n"
    (tmp_path / "words.yaml").write_bytes(definition.replace("\n", "\r\n").encode("utf-8-sig"))
    check_names([str(tmp_path)])
    (task,) = load_tasks([str(tmp_path)]).single
    assert task.task_name == "marked_words"
    assert next(iter(task.test_docs()))["q"] == "Noah likes"


def test_a_byte_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n" * 100_000 + b"caf\xe9")

    with pytest.raises(ValueError, match="it is not UTF-8 text"), open_text(tmp_path / "a.txt") as file:
        file.read()
