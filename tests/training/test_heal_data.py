"""Texts as sequences, and the order in which they are seen."""

import json

import numpy as np
import pytest

from model_preparation.errors import SurgeryError
from model_preparation.training.heal_data import Sequences, Shuffled, hold_out, load_sequences
from tests.conftest import make_tokenizer


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
    tokens = load_sequences(str(tmp_path), tokenizer, 3).tokens.reshape(-1).tolist()
    assert tokenizer.decode(tokens) == "abc</s>de</s>f</s>"


def test_held_out_sequences_are_spread_and_in_no_training_set():
    train, held_out = hold_out(Sequences(np.arange(100).reshape(100, 1)), 0.05)
    assert held_out.tokens[:, 0].tolist() == [0, 25, 50, 74, 99]
    assert not set(train.tokens[:, 0]) & set(held_out.tokens[:, 0])
    assert len(train) == 95


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\xff", "cannot be read as text"),
        ("a.jsonl", b'{"text": 3}', 'line 1 has no "text"'),
        ("a.jsonl", b'{"text": "x"}\n{', "cannot be read as text"),
        ("a.txt", b"abc", "has 4 tokens, fewer than one sequence of 8"),
    ],
)
def test_what_is_no_text_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError, match=words):
        load_sequences(str(tmp_path / name), make_tokenizer(), 8)
