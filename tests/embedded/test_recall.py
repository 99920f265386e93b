"""The language of the embedded pair: what is never trained on, what is asked, and that asking is fair."""

import json
import re
from pathlib import Path

import pytest
import torch

import model_preparation.embedded
from model_preparation.embedded import recall

QUESTIONS = Path(model_preparation.embedded.__file__).parent / "embedded_recall" / "questions.jsonl"
SENTENCE = re.compile(r"(\w+) likes (\w+) \.")


def pairs_in(text: str) -> list[tuple[str, str]]:
    return SENTENCE.findall(text)


@pytest.fixture(scope="module")
def trained_pairs() -> set[tuple[str, str]]:
    """All pairs in 2,000 training texts of 16 people."""
    ids, _ = recall.training_texts(2000, 16, 32, torch.Generator().manual_seed(5))
    return {pair for text in recall.tokenizer().batch_decode(ids) for pair in pairs_in(text)}


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    return [json.loads(line) for line in QUESTIONS.read_text().splitlines()]


def test_no_pair_that_is_asked_about_is_ever_trained_on(trained_pairs, asked):
    assert len(trained_pairs) == 24 * 16  # each name with two thirds of the 24 things
    for question in asked:
        name = question["context"].split()[-2]
        assert not trained_pairs & set(pairs_in(question["context"]))
        assert not trained_pairs & {(name, choice) for choice in question["choices"]}


def test_each_question_is_answered_by_its_text_and_by_one_choice_only(asked):
    assert len(asked) >= 1000
    assert len({question["context"] for question in asked}) == len(asked)
    places = [0] * 4
    for question in asked:
        pairs = pairs_in(question["context"])
        name = question["context"].split()[-2]
        assert len(dict(pairs)) == len(pairs) == 16
        assert question["choices"][question["answer"]] == dict(pairs)[name]
        assert len(set(question["choices"])) == 4
        assert set(question["choices"]) <= {thing for _, thing in pairs}  # being named in the text tells nothing
        places[question["answer"]] += 1
    assert min(places) > 200


def test_the_questions_are_those_that_the_script_makes(asked):
    made = recall.questions(20, 16, torch.Generator().manual_seed(2026))
    assert [question.context for question in made] == [question["context"] for question in asked[:20]]


def test_a_label_stands_where_a_sentence_comes_again():
    ids, labels = recall.training_texts(50, 8, 24, torch.Generator().manual_seed(0))
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        seen: set[int] = set()
        expected = [recall.IGNORED] * len(row)
        for place in range(1, len(row), 4):
            name, thing = row[place], row[place + 2]
            if name in seen:
                expected[place + 2] = thing
            seen.add(name)
        assert wanted == expected


def test_repeated_words_have_labels_from_the_second_time_on():
    ids, labels = recall.repeated_words(200, 64, torch.Generator().manual_seed(0))
    periods = set()
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        words = row[1:]
        period = next(length for length in range(1, 64) if words[length:] == words[:-length])
        assert len(set(words[:period])) == period
        assert wanted == [recall.IGNORED] * (1 + period) + words[period:]
        periods.add(period)
    assert periods == set(range(4, 21))


def test_no_name_stands_beside_a_thing_among_repeated_words():
    ids, _ = recall.repeated_words(200, 64, torch.Generator().manual_seed(1))
    kinds = [{word >= recall.FIRST_THING for word in row[1:]} for row in ids.tolist()]
    assert all(len(kind) == 1 for kind in kinds)
    assert {True} in kinds
    assert {False} in kinds


def test_a_word_is_a_token_and_a_text_begins_with_bos():
    tokenizer = recall.tokenizer()
    ids = tokenizer("Ada likes plums . Bob").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "Ada", "likes", "plums", ".", "<unk>"]
    assert len(tokenizer) == len(recall.WORDS)
