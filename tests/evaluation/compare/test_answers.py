"""`match` pairs questions of equal content, in any order, each as often as all evaluations have it."""

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from model_preparation.evaluation.compare.answers import Answer, Answers, match


def answers(docs, prompts=None, targets=None):
    """Answers whose values are their places, so that it is seen which were matched."""
    hashes = zip(docs, prompts or docs, targets or "T" * len(docs), strict=True)
    return Answers(Path("samples.jsonl"), "none", [Answer(*each, place, 0.5, 0) for place, each in enumerate(hashes)])


orders = st.lists(st.text("abcde", min_size=1, max_size=1), max_size=9)


@given(st.lists(orders, min_size=2, max_size=3))
def test_every_question_is_matched_as_often_as_all_have_it(models):
    common = match("task", [answers(docs) for docs in models])

    counts = [Counter(docs) for docs in models]
    expected = {doc: min(count[doc] for count in counts) for doc in counts[0]}
    places = common.column("value").astype(int)
    assert Counter(models[0][place] for place in places[0]) == +Counter(expected)
    assert list(places[0]) == sorted(places[0])  # in the baseline's order
    for docs, row in zip(models, places, strict=True):
        assert [docs[place] for place in row] == [models[0][place] for place in places[0]]
        assert len(set(row)) == len(row)


def test_a_question_that_occurs_twice_is_matched_in_order():
    common = match("task", [answers("aba"), answers("aab")])
    assert common.column("value").tolist() == [[0, 1, 2], [0, 2, 1]]


def test_rows_with_other_columns_are_matched_by_prompt_and_target():
    common = match("task", [answers("abc", "xyz", "TUT"), answers("def", "zyx", "TTT")])
    assert common.by_prompt
    assert common.column("value").tolist() == [[0, 2], [2, 0]]


def test_differing_prompts_are_counted():
    common = match("task", [answers("abc", "xyz"), answers("abc", "xwz")])
    assert not common.by_prompt
    assert (common.differing("prompt_hash"), common.differing("target_hash")) == (1, 0)
