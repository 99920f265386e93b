"""Evaluations: made once, kept; a failure is no score. Racing drops only what is surely worse."""

import numpy as np
import pytest

from model_preparation.search.candidate_scores import BudgetSpent
from model_preparation.search.journal import Journal
from model_preparation.search.race import race_rounds
from tests.search.planted import PlantedQuestions, PlantedScorer, draw_sets, make_scores, worth

SETS = draw_sets(12)


def test_nothing_is_evaluated_twice_not_even_by_another_run(tmp_path):
    first = make_scores(tmp_path)
    ranked = first.evaluate([*SETS, *SETS[:3]])
    first.evaluate(SETS[:5])
    assert [layers for layers, _ in first.scorer.run] == sorted(SETS)
    assert first.statistics()["evaluations"] == len(SETS)
    assert first.statistics()["layer_passes_alone"] == 12 * len(SETS)
    first.journal.close()
    second = make_scores(tmp_path)
    assert second.evaluate(SETS) == ranked
    assert second.scorer.run == []
    assert second.scorer.layer_passes == 0
    for name in ("evaluations", "layer_passes", "seconds"):
        assert second.statistics()[name] == pytest.approx(first.statistics()[name], abs=0.1)
    second.journal.close()


def test_evaluations_with_other_settings_do_not_count(tmp_path):
    first = make_scores(tmp_path)
    first.evaluate(SETS[:4])
    first.journal.close()
    other = make_scores(tmp_path, digest="other")
    other.evaluate(SETS[:4])
    assert len(other.scorer.run) == 4
    other.journal.close()


def test_journals_keep_their_meaning(tmp_path):
    """An entry has the answers of each part in the order of its questions, as version 0.2.0 wrote them."""
    rounds = race_rounds(PlantedQuestions(16))
    assert [each.questions for each in rounds] == [[10], [14], [1, 5], [2, 3, 9, 11], [0, 4, 6, 7, 8, 12, 13, 15]]
    journal = Journal(tmp_path / "journal.jsonl")
    for layers, right in (([], "0000" * 4), ([3], "0110" * 4)):
        entry = {"settings": "d", "layers": layers, "parts": [0, 1, 2, 3, 4], "right": right}
        journal.append({**entry, "passes": 12.0, "seconds": 1.0})
    journal.close()
    scores = make_scores(tmp_path, 16)
    assert scores.evaluate([(3,)]) == [(3,)]
    assert scores.scorer.run == []
    assert np.flatnonzero(scores.right((3,))).tolist() == [1, 3, 4, 6, 9, 12, 13, 14]
    assert scores.statistics()["layer_passes"] == 24
    scores.journal.close()


def test_a_failure_is_tried_again_and_is_no_score(tmp_path):
    scorer = PlantedScorer(PlantedQuestions(400), fail={SETS[2]: 1, SETS[6]: 9})
    scores = make_scores(tmp_path, scorer=scorer)
    ranked = scores.evaluate(SETS)
    assert sorted(ranked) == sorted(set(SETS) - {SETS[6]})
    assert scores.failed == {SETS[6]: "CUDA error: something. Try again"}
    assert not scores.is_known(SETS[6])
    assert [entry["error"] for entry in scores.journal.entries if "error" in entry] == [
        "CUDA error: something. Try again"
    ]
    scores.journal.close()
    again = make_scores(tmp_path)
    assert sorted(again.evaluate(SETS)) == sorted(SETS)
    assert again.scorer.run == [(SETS[6], 400)]
    again.journal.close()


def test_a_budget_of_evaluations_is_kept_to_and_counts_those_of_before(tmp_path):
    first = make_scores(tmp_path, budget_evaluations=5)
    with pytest.raises(BudgetSpent):
        first.evaluate(SETS)
    assert first.complete == first.ranked(SETS[:5])
    first.journal.close()
    second = make_scores(tmp_path, budget_evaluations=7)
    with pytest.raises(BudgetSpent):
        second.evaluate(SETS)
    assert [layers for layers, _ in second.scorer.run] == sorted(SETS[5:7])
    assert second.evaluate(SETS[:7])
    second.journal.close()


def test_a_budget_of_time_ends_the_search(tmp_path):
    scores = make_scores(tmp_path, budget_hours=1e-12)
    with pytest.raises(BudgetSpent):
        scores.evaluate(SETS)
    assert len(scores.order) == 1
    scores.journal.close()


def test_in_a_race_the_best_are_those_of_a_full_evaluation_and_less_is_run(tmp_path):
    full = make_scores(tmp_path / "full", count=1600)
    race = make_scores(tmp_path / "race", count=1600, race=True)
    sets = draw_sets(40)
    best = full.evaluate(sets, 3)[:3]
    assert race.evaluate(sets, 3)[:3] == best
    assert race.dropped
    for layers in race.dropped:
        assert worth(layers) < worth(best[2])
        assert 0 < race.questions_asked(layers) < 1600
        assert race.estimate(layers) == pytest.approx(worth(layers), abs=0.1)
        assert layers not in race.complete
    asked = [sum(questions for _, questions in each.scorer.run) for each in (race, full)]
    assert asked[0] < 0.7 * asked[1]
    # Questions asked in parts get the same answers as all at once.
    for layers in race.complete:
        assert (race.values(layers) == full.values(layers)).all()
    full.journal.close()
    race.journal.close()


def test_what_fails_in_a_later_round_of_a_race_is_failed_and_not_dropped(tmp_path):
    sets = draw_sets(40)
    best = max(sets, key=worth)

    class FailsLater(PlantedScorer):
        def answer(self, layers, batches):
            if [each for each, _ in self.run].count(layers) > 1 and layers == best:
                raise RuntimeError("CUDA error: something. Try again")
            return super().answer(layers, batches)

    race = make_scores(tmp_path, count=1600, race=True, scorer=FailsLater(PlantedQuestions(1600)))
    race.evaluate(sets, 3)
    assert race.questions_asked(best) > 0
    assert race.failed.keys() == {best}
    assert race.dropped
    assert best not in race.dropped
    assert race.statistics()["dropped_early"] == len(race.dropped)
    race.journal.close()


def test_candidates_that_are_alike_are_not_dropped(tmp_path):
    race = make_scores(tmp_path, race=True)
    alike = [(0,), (10,), (2,), (8,)]  # 0.00 to 0.01 apart
    race.evaluate(alike, 1)
    assert race.dropped == []
    race.journal.close()
