"""Texts as sequences, and the order in which they are seen."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from model_preparation.errors import SurgeryError
from model_preparation.train.heal.sequences import Sequences, Shuffled, hold_out, load_sequences
from model_preparation.train.heal.settings import HealSettings
from tests.checkpoint.test_sources import NOBODY, Caches, FakeHub, caches, hub  # noqa: F401
from tests.conftest import make_tokenizer


def load(data: str, tokenizer, block_size: int, **settings) -> Sequences:
    return load_sequences(data, tokenizer, HealSettings(block_size=block_size, **settings), print)


def seen(shuffled: Shuffled) -> list[int]:
    return [int(shuffled[index]["input_ids"][0]) for index in range(len(shuffled))]


def test_every_pass_has_every_sequence_once_in_an_order_of_its_own():
    numbers = Sequences(np.arange(10).reshape(10, 1))
    order = seen(Shuffled(numbers, 3, 0, 20))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order == seen(Shuffled(numbers, 3, 0, 20)) != seen(Shuffled(numbers, 4, 0, 20))


def test_a_position_holds_the_same_sequence_wherever_a_run_begins():
    numbers = Sequences(np.arange(10).reshape(10, 1))
    whole = seen(Shuffled(numbers, 0, 0, 40))
    assert all(seen(Shuffled(numbers, 0, start, 9)) == whole[start : start + 9] for start in range(30))


def test_files_folders_and_json_lines_are_joined_with_the_end_of_text(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.jsonl").write_text(
        json.dumps({"text": "de", "id": 1}) + "\n\n" + json.dumps({"text": "f"})
    )
    (tmp_path / "skipped.csv").write_text("no text")
    tokens = load(str(tmp_path), tokenizer, 3).tokens.reshape(-1).tolist()
    assert tokenizer.decode(tokens) == "abc</s>de</s>f</s>"


def test_held_out_sequences_are_spread_and_in_no_training_set():
    train, held_out = hold_out(Sequences(np.arange(100).reshape(100, 1)), 0.05)
    assert held_out.tokens[:, 0].tolist() == [0, 25, 50, 74, 99]
    assert not set(train.tokens[:, 0]) & set(held_out.tokens[:, 0])
    assert len(train) == 95


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\xff", "cannot be used"),
        ("a.jsonl", b'{"text": 3}', 'line 1 has no field "text" with a string'),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is no JSON"),
        ("a.json", b'{"text": "x"}', r"a.json ends in none of .txt, .md, .jsonl, .parquet"),
        ("a.csv", b"text", "ends in none of"),
        ("a.txt", b"abc", "is shorter than one sequence: 4 of 8 tokens"),
    ],
)
def test_what_is_no_text_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError, match=words):
        load(str(tmp_path / name), make_tokenizer(), 8)


def test_capitals_in_the_ending_and_a_byte_order_mark_change_nothing(tmp_path):
    line = '{"text": "the same text, again and again"}'
    found = []
    for name, content in (("a.jsonl", line), ("A.JSONL", line), ("b.jsonl", "\ufeff" + line)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        found.append(load(str(tmp_path / name), make_tokenizer(), 8).tokens.tolist())
    assert found[0] == found[1] == found[2]
    (tmp_path / "c.txt").write_text("\ufeffthe same text, again and again", encoding="utf-8")
    assert load(str(tmp_path / "c.txt"), make_tokenizer(), 8).tokens.tolist() == found[0]


def test_tables_are_read_by_their_column_of_text(tmp_path):
    tokenizer = make_tokenizer()
    table = pyarrow.table({"id": [1, 2], "text": ["ab", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    tokens = load(str(tmp_path), tokenizer, 5).tokens.reshape(-1).tolist()
    assert tokenizer.decode(tokens) == "ab</s>c</s>"
    pyarrow.parquet.write_table(table.rename_columns(["id", "words"]), tmp_path / "b.parquet")
    with pytest.raises(SurgeryError, match=r'b\.parquet cannot be used: its columns are id, words; it needs "text"'):
        load(str(tmp_path), tokenizer, 5)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 is all")
    with pytest.raises(SurgeryError, match=r"b\.parquet cannot be used"):
        load(str(tmp_path), tokenizer, 5)


def test_a_data_set_of_the_hub_is_downloaded_once(hub: FakeHub, caches: Caches, tmp_path, monkeypatch):  # noqa: F811
    def at(url: str, offline: bool) -> None:
        caches.hubs_at(url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)

    tokenizer = make_tokenizer()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    card = "---\nconfigs:\n" + "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    rows = {f"{name}.jsonl": json.dumps({"text": text}).encode() for name, text in (("a", "xyz"), ("b", "uvw"))}
    hub.huggingface["datasets/org/text"] = {"README.md": f"{card}---\n".encode(), **rows}
    at(hub.url, offline=False)
    with pytest.raises(SurgeryError, match=r"no data set could be loaded .*'a', 'b'.*org/name:config"):
        load("org/text", tokenizer, 4)
    for offline in (False, True):
        at(NOBODY if offline else hub.url, offline=offline)
        tokens = load("org/text:b", tokenizer, 4).tokens.reshape(-1).tolist()
        assert tokenizer.decode(tokens) == "uvw</s>"
    assert hub.sent.count("b.jsonl") == 1
    assert "a.jsonl" not in hub.sent


def test_a_data_set_of_modelscope_is_downloaded_once(hub: FakeHub, caches: Caches, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    tokenizer = make_tokenizer()
    rows = {f"data/{split}.jsonl": json.dumps({"text": split}).encode() for split in ("train", "test")}
    hub.modelscope["datasets/org/text"] = {"README.md": b"# Text", "model.bin": b"-", **rows}
    for url in (hub.url, NOBODY):
        caches.hubs_at(url)
        tokens = load("modelscope:org/text", tokenizer, 6).tokens.reshape(-1).tolist()
        assert tokenizer.decode(tokens) == "train</s>"
    assert "ModelScope" in caplog.text
    assert hub.sent.count("data/train.jsonl") == 1
    assert "model.bin" not in hub.sent
    caches.hubs_at(hub.url)
    with pytest.raises(
        SurgeryError, match=r"modelscope:org/none .*no data set could be loaded \(ModelScope .* has no such"
    ):
        load("modelscope:org/none", tokenizer, 6)
    with pytest.raises(SurgeryError, match=r"modelscop:org/text is neither .* nor the name of a data set: org/name"):
        load("modelscop:org/text", tokenizer, 6)
