"""The scores of all combinations: the sets of layers or heads (`LayerSet`) that a search method asks for.

Each combination is evaluated once, and the journal keeps the evaluation. A failed evaluation is tried once more, alone.
If it fails again, the combination has a reason and no score. Races drop bad combinations early (race.py).
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from model_preparation import interrupts
from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.untrusted.untrusted_files import check_fields
from model_preparation.search.journal import Journal
from model_preparation.search.layer_sets import BASE, WHOLE_LAYERS, LayerSet, Units
from model_preparation.search.objective import Objective, Values
from model_preparation.search.progress import SearchProgress
from model_preparation.search.question_set import QuestionSet
from model_preparation.search.race import race_rounds, survivors
from model_preparation.search.settings import ACCURACY, SearchSettings
from model_preparation.search.shared_scoring import Results

# A failed evaluation raises one of these. Other errors come from a bug or from the disk.
_FAILURES = (SurgeryError, RuntimeError, MemoryError)
_SEQUENCE, _NUMBER = (list, tuple), (int, float)
_ENTRY = {"parts": _SEQUENCE, "right": str, "passes": _NUMBER, "seconds": _NUMBER}  # "parts" are the rounds' numbers


class Scorer(Protocol):
    """A `SharedScorer`, or a scorer that spreads the same work over machines."""

    @property
    def layer_passes(self) -> float: ...

    def base(self) -> Results: ...

    def donor_answers(self) -> Results: ...

    def score(
        self, sets: Iterable[LayerSet], batches: Sequence[int] | None = None
    ) -> Iterator[tuple[LayerSet, Results]]: ...


@dataclass(frozen=True)
class _Answered:
    """A combination's answers to the questions of one round. `cost` is (layer passes, seconds).

    `values` has, for each question, the value that the search maximises. `right` has 1 for each right answer, else 0.
    """

    values: Values
    right: Values
    cost: Values


class BudgetSpent(Exception):
    """The search's budget, of evaluations or of hours, is spent."""


class CandidateScores:
    """All evaluations of a search.

    An interrupted search that runs again ends like an uninterrupted one: budgets count the evaluations of all its runs.

    Args:
        scorer: gives answers.
        questions: the questions of the search.
        objective: says which value the search maximises, and tests differences of values.
        journal: keeps the evaluations.
        digest: the digest of everything that answers depend on. The journal's entries with other digests are ignored.
        total: how many layers a model has.
        settings: say how large the budgets are, and whether candidates race.
        progress: shows how the search is going.
        units: whether combinations consist of layers or of heads.

    Attributes:
        asked: how many combinations the method has asked for, repeats included.
        failed: the reasons of failed evaluations, by combination.
    """

    def __init__(
        self,
        scorer: Scorer,
        questions: QuestionSet,
        objective: Objective,
        journal: Journal,
        digest: str,
        *,
        total: int,
        settings: SearchSettings,
        progress: SearchProgress,
        units: Units = WHOLE_LAYERS,
    ):
        self._scorer = scorer
        self._questions = questions
        self._rounds = race_rounds(questions)
        self._all_rounds = tuple(range(len(self._rounds)))
        self.objective = objective
        self._journal = journal
        self._digest = digest
        self._total = total
        self._most = settings.budget_evaluations
        self._seconds = None if settings.budget_hours is None else settings.budget_hours * 3600
        self._races = settings.races
        self._progress = progress
        self._units = units
        self.asked = 0
        self.failed: dict[LayerSet, str] = {}
        self._entered: dict[LayerSet, None] = {}  # combinations within the budget, evaluated or not yet
        self._journaled: dict[LayerSet, dict[int, _Answered]] = {}  # by combination and round
        # The part of `_journaled` that this run has asked for. A run that continues a search uses no other
        # part, so it decides like a first run.
        self._known: dict[LayerSet, dict[int, _Answered]] = {}
        self._spent = np.zeros(2)  # (layer passes, seconds)
        self._best: LayerSet | None = None
        self._fitness: dict[LayerSet, float] = {}  # of complete evaluations
        self._has_base_states = False
        for entry in journal.entries:
            if entry.get("settings") == digest:
                try:
                    self._add(entry)
                except (TypeError, ValueError, LookupError) as error:
                    raise SurgeryError(
                        f"{journal.path} has an entry that no search wrote ({type(error).__name__}: {error}), for "
                        f"{units.word} {entry.get(units.word)!r:.80}. Remove that line, and the search "
                        "scores them again."
                    ) from error

    def base(self) -> Values:
        """The base's values, by question. Runs the base if the journal has no answers from it."""
        if not self.is_complete(BASE):
            if BASE not in self._journaled:
                self._run_base()
            self._use(BASE, self._all_rounds)
        return self.values(BASE)

    def evaluate(self, sets: Iterable[LayerSet], keep: int | None = None) -> list[LayerSet]:
        """Evaluate combinations. Return those that have answered all questions, the best first.

        Args:
            sets: the combinations, the most promising first. Known answers cost nothing.
            keep: how many of the best combinations have to answer all questions. In a race, others are dropped once
                they are surely worse than the `keep`th best.

        Raises:
            BudgetSpent: if the time is over, or if the budget does not cover all combinations. The first
                combinations, which the budget covers, are evaluated before.
        """
        wanted = list(dict.fromkeys(sets))
        self.base()
        self.asked += len(wanted)
        new = [layers for layers in wanted if layers not in self._entered]
        room = len(new) if self.room is None else self.room
        self._entered |= dict.fromkeys(new[:room])
        allowed = [layers for layers in wanted if layers in self._entered and layers not in self.failed]
        self._progress.set_total(len(self._entered) if self._most is None else self._most)
        if self._races and keep is not None and len(allowed) > keep:
            self._race(allowed, keep)
        else:
            self._run(allowed, self._all_rounds)
        if len(new) > room:
            raise BudgetSpent
        return self.ranked(layers for layers in allowed if self.is_complete(layers))

    @property
    def room(self) -> int | None:
        """How many more combinations the budget covers; None if there is no limit."""
        return None if self._most is None else max(0, self._most - len(self._entered))

    def is_complete(self, layers: LayerSet) -> bool:
        """Whether a combination has answered all questions."""
        return len(self._known.get(layers, ())) == len(self._rounds)

    def is_known(self, layers: LayerSet) -> bool:
        """Whether a combination has answered at least some questions."""
        return bool(self._known.get(layers))

    def ranked(self, sets: Iterable[LayerSet]) -> list[LayerSet]:
        """The combinations sorted by `estimate`, the best first. Of equally good ones, smaller ones come first."""
        return sorted(sets, key=lambda layers: (-self.estimate(layers), len(layers), layers))

    def estimate(self, layers: LayerSet) -> float:
        """The fitness: the mean value. With some rounds only: the base's fitness plus the mean difference in them."""
        if layers in self._fitness:
            return self._fitness[layers]
        rounds = sorted(self._known[layers])
        ours, bases = (
            np.concatenate([self._known[each][number].values for number in rounds]) for each in (layers, BASE)
        )
        return self._fitness[BASE] + float((ours - bases).mean())

    def values(self, layers: LayerSet) -> Values:
        """The values that the search maximises, by question, of a complete evaluation."""
        return self._of_all_questions(layers, "values")

    def right(self, layers: LayerSet) -> Values:
        """Whether each answer of a complete evaluation is right (1) or wrong (0), by question."""
        return self._of_all_questions(layers, "right")

    @property
    def order(self) -> list[LayerSet]:
        """The combinations in the order of their evaluation."""
        return [layers for layers in self._known if layers != BASE]

    def questions_asked(self, layers: LayerSet) -> int:
        return sum(len(found.values) for found in self._known.get(layers, {}).values())

    @property
    def complete(self) -> list[LayerSet]:
        """All combinations that have answered all questions, the best first."""
        return self.ranked(layers for layers in self._entered if self.is_complete(layers))

    @property
    def dropped(self) -> list[LayerSet]:
        """The combinations that a race dropped, or that were in a race when the budget ended; the best first."""
        in_race = (each for each in self._entered if self.is_known(each) and not self.is_complete(each))
        return self.ranked(layers for layers in in_race if layers not in self.failed)

    def statistics(self) -> dict[str, Any]:
        """The cost of the search, and what it would have cost if each combination had been evaluated alone."""
        done = len(self.order)
        return {
            "evaluations": done,
            "dropped_early": len(self.dropped),
            "failed": len(self.failed),
            "asked_with_repeats": self.asked,
            "layer_passes": round(float(self._spent[0]), 2),
            "layer_passes_alone": done * self._total,
            "layer_passes_alone_with_repeats": self.asked * self._total,
            "seconds": round(float(self._spent[1]), 1),
        }

    def _race(self, sets: Sequence[LayerSet], keep: int) -> None:
        """Ask round after round, and drop candidates that are surely worse than the `keep`th best."""
        alive = list(sets)
        for number in self._all_rounds:
            self._run(alive, [number])
            alive = [layers for layers in alive if layers not in self.failed]
            if number < self._all_rounds[-1] and len(alive) > keep:
                values = {
                    layers: np.concatenate([self._known[layers][before].values for before in range(number + 1)])
                    for layers in alive
                }
                alive = survivors(values, keep, self.objective, len(sets), len(self._rounds))

    def _run(self, sets: Iterable[LayerSet], rounds: Sequence[int]) -> None:
        """Evaluate these combinations in these rounds, where the journal has no answers yet."""
        by_missing: dict[tuple[int, ...], list[LayerSet]] = {}
        for layers in sets:
            known = self._journaled.get(layers, {})
            self._use(layers, [number for number in rounds if number in known])
            if missing := tuple(number for number in rounds if number not in known):
                by_missing.setdefault(missing, []).append(layers)
        for missing, members in by_missing.items():
            self._run_base()
            for layers in self._score(members, missing):  # a failed combination gets a second try, alone
                for reason in self._score([layers], missing).values():
                    self.failed[layers] = reason
                    of_set = {self._units.word: self._units.written(layers)}
                    self._journal.append({"settings": self._digest, **of_set, "error": reason})
                    self._progress.failed(self._units.names(layers), reason)

    def _score(self, sets: Sequence[LayerSet], rounds: tuple[int, ...]) -> dict[LayerSet, str]:
        """Evaluate combinations in these rounds, and write the journal. Return reasons of failures, by combination."""
        batches = sorted(batch for number in rounds for batch in self._rounds[number].batches)
        left = dict.fromkeys(sets, "")
        answered = self._scorer.score(sets, batches)
        while True:
            since = self._now()
            try:
                layers, results = next(answered)
            except StopIteration:
                return left
            except _FAILURES as error:  # every combination without answers counts as failed
                return {layers: one_line(error) for layers in left}
            interrupts.check()
            try:
                self._record(layers, rounds, results, since)
            except SurgeryError as error:
                left[layers] = one_line(error)
                continue
            del left[layers]
            try:
                self._use(layers, rounds)
            finally:
                self._show_progress()

    def _run_base(self) -> None:
        """Run the base, unless this run has done so: all other evaluations start from its hidden states."""
        if self._has_base_states:
            return
        since = self._now()
        with self._progress.running_the_base():
            results = self._scorer.base()
        self._has_base_states = True
        try:
            self._record(BASE, self._all_rounds, results, since)
        except SurgeryError as error:
            raise SurgeryError(f"The base cannot be scored: {error}. Try --dtype float32, or another base.") from error

    def _now(self) -> Values:
        return np.array([self._scorer.layer_passes, time.monotonic()])

    def _record(self, layers: LayerSet, rounds: tuple[int, ...], results: Results, since: Values) -> None:
        """Write an evaluation to the journal. `since` is what `_now` gave when the evaluation began.

        Raises:
            SurgeryError: if an answer is not finite.
        """
        asked = [question for number in rounds for question in self._rounds[number].questions]
        right = self._questions.values(results)
        values = {}
        if self.objective.name != ACCURACY:
            maximised = self._questions.maximised(results)
            values = {"values": [maximised[question] for question in asked]}
        passes, seconds = (self._now() - since).tolist()
        entry = {
            "settings": self._digest,
            self._units.word: self._units.written(layers),
            "parts": rounds,
            "right": "".join("1" if right[question] else "0" for question in asked),
            **values,
            "passes": round(passes, 4),
            "seconds": round(seconds, 4),
        }
        self._journal.append(entry)
        self._add(entry)

    def _add(self, entry: dict[str, Any]) -> None:
        """Add an entry of the journal to `_journaled`."""
        if "error" in entry:
            return  # the failed evaluation is tried again
        check_fields(entry, {self._units.word: _SEQUENCE, **_ENTRY})
        layers = self._units.read(entry[self._units.word])
        if layers == BASE:  # each run of an interrupted search has run the base, and wrote an entry
            self._spent += (entry["passes"], entry["seconds"])
        cost = np.array([0.0, 0.0] if layers == BASE else [entry["passes"], entry["seconds"]]) / len(entry["parts"])
        right = np.array([float(digit) for digit in entry["right"]])
        values = np.array(entry.get("values", right), dtype=np.float64)
        start = 0
        for number in entry["parts"]:
            end = start + len(self._rounds[number].questions)
            self._journaled.setdefault(layers, {})[number] = _Answered(values[start:end], right[start:end], cost)
            start = end

    def _use(self, layers: LayerSet, rounds: Iterable[int]) -> None:
        """Copy rounds from `_journaled` to `_known`, and count their cost. Raises BudgetSpent if the time is over."""
        known = self._known.get(layers, {})
        new = [number for number in rounds if number not in known]
        for number in new:
            answered = self._journaled[layers][number]
            self._known.setdefault(layers, {})[number] = answered
            self._spent += answered.cost
        if self.is_complete(layers) and layers not in self._fitness:
            self._fitness[layers] = float(self.values(layers).mean())
            if layers != BASE and (self._best is None or self.ranked([layers, self._best])[0] == layers):
                self._best = layers
        if new and layers != BASE and self._seconds is not None and self._spent[1] > self._seconds:
            raise BudgetSpent

    def _show_progress(self) -> None:
        done = len(self.order)
        saved = 1 - self._spent[0] / (done * self._total)
        best = None if self._best is None else (self._units.names(self._best), self._fitness[self._best])
        self._progress.evaluated(done, max(0.0, float(saved)), best)

    def _of_all_questions(self, layers: LayerSet, which: str) -> Values:
        whole = np.empty(len(self._questions.questions))
        for number, found in self._known[layers].items():
            whole[self._rounds[number].questions] = getattr(found, which)
        return whole
