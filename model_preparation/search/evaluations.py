"""What is known of every combination: asked once, journaled, and never asked again.

In: the combinations that a method wants to know of. Out: what each is worth. An evaluation that fails is tried once
more by itself; if it fails again it is an error with its reason, and never a score.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from model_preparation import interrupts
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.paired import SIGNIFICANCE
from model_preparation.io.untrusted.untrusted_files import check_fields
from model_preparation.search.cached_scoring import Results
from model_preparation.search.journal import Journal
from model_preparation.search.layer_sets import LayerSet
from model_preparation.search.objective import ACCURACY, Objective, Values
from model_preparation.search.parts import Part
from model_preparation.search.progress import SearchProgress
from model_preparation.search.question_set import QuestionSet

BASE: LayerSet = ()
_FAILURES = (SurgeryError, RuntimeError, MemoryError)  # of an evaluation; anything else is ours, or the disk's

_ENTRY = {
    "layers": (list, tuple),
    "parts": (list, tuple),
    "right": str,
    "passes": (int, float),
    "seconds": (int, float),
}


class Scorer(Protocol):
    """`CachedScorer`, or what spreads the same over machines."""

    @property
    def layer_passes(self) -> float: ...

    def base(self) -> Results: ...

    def donor_answers(self) -> Results: ...

    def score(
        self, sets: Iterable[LayerSet], batches: Sequence[int] | None = None
    ) -> Iterator[tuple[LayerSet, Results]]: ...


@dataclass(frozen=True)
class _Answered:
    """Answers of a combination to a part of the questions: what is maximised, what is right (0 or 1), per question.

    `cost` is (layer passes, seconds).
    """

    values: Values
    right: Values
    cost: Values


class BudgetSpent(Exception):
    """No more evaluations may be made."""


class Evaluations:
    """All evaluations of a search.

    Args:
        scorer: what answers.
        questions: what it answers.
        parts: of the questions, in the order in which they are asked when candidates race.
        objective: what the answers are worth.
        journal: where evaluations are kept.
        digest: of all that decides on an evaluation; entries of another one are not looked at.
        total: layers of the model.
        most: how many combinations may be evaluated; None for any number. Those of an earlier, interrupted run of the
            same search count too, so that going on ends like an uninterrupted run.
        seconds: how long evaluations may take in all, those of an interrupted run included.
        racing: whether candidates that are surely worse are dropped early.
        progress: told what happens.

    Attributes:
        asked: how often a combination was asked for, repeats included.
        failed: why evaluations failed, by combination.
    """

    def __init__(
        self,
        scorer: Scorer,
        questions: QuestionSet,
        parts: Sequence[Part],
        objective: Objective,
        journal: Journal,
        digest: str,
        *,
        total: int,
        most: int | None = None,
        seconds: float | None = None,
        racing: bool = False,
        progress: SearchProgress,
    ):
        self._scorer = scorer
        self._questions = questions
        self._parts = parts
        self.objective = objective
        self._journal = journal
        self._digest = digest
        self._total = total
        self._most = most
        self._seconds = seconds
        self._racing = racing
        self._progress = progress
        self.asked = 0
        self.failed: dict[LayerSet, str] = {}
        self._entered: dict[LayerSet, None] = {}  # what this search may evaluate, whether it has been or not
        self._journaled: dict[LayerSet, dict[int, _Answered]] = {}  # by combination and part
        # Of those, what this search has come to. Run again after it was stopped, it must not know more than it did.
        self._known: dict[LayerSet, dict[int, _Answered]] = {}
        self._spent = np.zeros(2)  # (layer passes, seconds)
        self._best: LayerSet | None = None
        self._fitness: dict[LayerSet, float] = {}  # of complete evaluations
        self._has_base_states = False
        for entry in journal.entries:
            if entry.get("settings") == digest:
                try:
                    self._take(entry)
                except (TypeError, ValueError, LookupError) as error:
                    raise SurgeryError(
                        f"{journal.path} has an entry that no search wrote ({type(error).__name__}: {error}), of "
                        f"{str(entry.get('layers'))!r:.80}. Remove that line, and its evaluation is made again."
                    ) from error

    def base(self) -> Values:
        """The base's values."""
        if not self.is_complete(BASE):
            if BASE not in self._journaled:
                self._prepare()
            self._come_to(BASE, range(len(self._parts)))
        return self.values(BASE)

    def evaluate(self, sets: Iterable[LayerSet], keep: int | None = None) -> list[LayerSet]:
        """Evaluate combinations, the most promising first; gives those of which all is known, the best first.

        Args:
            sets: what to evaluate; what is known already costs nothing.
            keep: how many of the best have to be evaluated on all questions. With racing, others may be dropped as
                soon as they are surely worse than the `keep`th best.

        Raises:
            BudgetSpent: if no more evaluations may be made; those that could be, were.
        """
        wanted = list(dict.fromkeys(sets))
        self.base()
        self.asked += len(wanted)
        new = [layers for layers in wanted if layers not in self._entered]
        room = len(new) if self.room is None else self.room
        self._entered |= dict.fromkeys(new[:room])
        allowed = [layers for layers in wanted if layers in self._entered and layers not in self.failed]
        self._progress.expect(len(self._entered) if self._most is None else self._most)
        if self._racing and keep is not None and len(allowed) > keep:
            self._race(allowed, keep)
        else:
            self._run(allowed, range(len(self._parts)))
        if len(new) > room:
            raise BudgetSpent
        return self.ranked(layers for layers in allowed if self.is_complete(layers))

    @property
    def room(self) -> int | None:
        """How many more combinations may be evaluated; None for any number."""
        return None if self._most is None else max(0, self._most - len(self._entered))

    def is_complete(self, layers: LayerSet) -> bool:
        """Whether a combination was evaluated on all questions."""
        return len(self._known.get(layers, ())) == len(self._parts)

    def is_known(self, layers: LayerSet) -> bool:
        """Whether a combination was evaluated on some questions at least."""
        return bool(self._known.get(layers))

    def ranked(self, sets: Iterable[LayerSet]) -> list[LayerSet]:
        """The best first; of equals, the one with fewer layers."""
        return sorted(sets, key=lambda layers: (-self.estimate(layers), len(layers), layers))

    def estimate(self, layers: LayerSet) -> float:
        """The fitness; where only a part is known, the base's with the difference on what both were asked."""
        if layers in self._fitness:
            return self._fitness[layers]
        parts = sorted(self._known[layers])
        ours, bases = (np.concatenate([self._known[each][part].values for part in parts]) for each in (layers, BASE))
        return self._fitness[BASE] + float((ours - bases).mean())

    def values(self, layers: LayerSet) -> Values:
        """What is maximised, by question, of a complete evaluation."""
        return self._whole(layers, "values")

    def right(self, layers: LayerSet) -> Values:
        """Which questions are answered right (1) or wrong (0), of a complete evaluation."""
        return self._whole(layers, "right")

    @property
    def order(self) -> list[LayerSet]:
        """The combinations of this search in the order in which they were evaluated."""
        return [layers for layers in self._known if layers != BASE]

    def questions_asked(self, layers: LayerSet) -> int:
        return sum(len(found.values) for found in self._known.get(layers, {}).values())

    @property
    def complete(self) -> list[LayerSet]:
        """All combinations of this search that were evaluated on all questions, the best first."""
        return self.ranked(layers for layers in self._entered if self.is_complete(layers))

    @property
    def dropped(self) -> list[LayerSet]:
        """Those of which only a part is known, as they were surely worse."""
        return self.ranked(layers for layers in self._entered if self.is_known(layers) and not self.is_complete(layers))

    def statistics(self) -> dict[str, Any]:
        """What the search cost, and what it would have cost to evaluate each combination alone."""
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
        """Ask part after part, and drop what is surely worse than the `keep`th best; see README, and Maron and Moore
        1997, The Racing Algorithm, for the idea; the test here is the paired one of `Objective`.
        """
        alive = list(sets)
        for part in range(len(self._parts)):
            self._run(alive, [part])
            alive = [layers for layers in alive if layers not in self.failed]
            if part == len(self._parts) - 1 or len(alive) <= keep:
                continue
            seen = {layers: self._seen(layers, part) for layers in alive}
            alive.sort(key=lambda layers: (-seen[layers].mean(), len(layers), layers))
            bar = seen[alive[keep - 1]]
            # Bonferroni, over all that may be dropped in this race.
            limit = SIGNIFICANCE / len(sets) / (len(self._parts) - 1)
            alive[keep:] = [layers for layers in alive[keep:] if self.objective.p_value(bar, seen[layers]) >= limit]

    def _seen(self, layers: LayerSet, last: int) -> Values:
        return np.concatenate([self._known[layers][part].values for part in range(last + 1)])

    def _run(self, sets: Iterable[LayerSet], parts: Sequence[int]) -> None:
        """Have these parts of these combinations known, or why not."""
        by_missing: dict[tuple[int, ...], list[LayerSet]] = {}
        for layers in sets:
            known = self._journaled.get(layers, {})
            self._come_to(layers, [part for part in parts if part in known])
            if missing := tuple(part for part in parts if part not in known):
                by_missing.setdefault(missing, []).append(layers)
        for missing, members in by_missing.items():
            self._prepare()
            again = self._score(members, missing)
            for layers in again:
                for reason in self._score([layers], missing).values():
                    self.failed[layers] = reason
                    self._journal.append({"settings": self._digest, "layers": layers, "error": reason})
                    self._progress.failed(layers, reason)

    def _score(self, sets: Sequence[LayerSet], parts: tuple[int, ...]) -> dict[LayerSet, str]:
        """Evaluate and journal; gives why those failed that did."""
        batches = sorted(batch for part in parts for batch in self._parts[part].batches)
        left = dict.fromkeys(sets, "")
        answered = self._scorer.score(sets, batches)
        while True:
            started, before = time.monotonic(), self._scorer.layer_passes
            try:
                layers, results = next(answered)
            except StopIteration:
                break
            except _FAILURES as error:  # what was not reached yet fails with it, and is tried by itself
                return {layers: _reason(error) for layers in left}
            interrupts.check()
            try:
                found = self._values(results)
            except SurgeryError as error:
                left[layers] = _reason(error)
                continue
            del left[layers]
            passes, seconds = self._scorer.layer_passes - before, time.monotonic() - started
            self._keep(layers, parts, found, passes, seconds)
            try:
                self._come_to(layers, parts)
            finally:
                self._tell()
        return left

    def _values(self, results: Results) -> tuple[dict[int, float], dict[int, float]]:
        """(What is maximised, what is right), by question."""
        right = self._questions.values(results)
        if self.objective.name == ACCURACY:
            return right, right
        divergences = self._questions.divergences(results)
        return {question: -divergence for question, divergence in divergences.items()}, right

    def _prepare(self) -> None:
        """Run the base, whose hidden states everything else starts from."""
        if self._has_base_states:
            return
        started, before = time.monotonic(), self._scorer.layer_passes
        with self._progress.running_the_base():
            results = self._scorer.base()
        self._has_base_states = True
        passes, seconds = self._scorer.layer_passes - before, time.monotonic() - started
        try:
            found = self._values(results)
        except SurgeryError as error:
            raise SurgeryError(f"The base cannot be scored: {error}. Try --dtype float32, or another base.") from error
        self._keep(BASE, tuple(range(len(self._parts))), found, passes, seconds)

    def _keep(
        self,
        layers: LayerSet,
        parts: tuple[int, ...],
        found: tuple[dict[int, float], dict[int, float]],
        passes: float,
        seconds: float,
    ) -> None:
        asked = [question for part in parts for question in self._parts[part].questions]
        values, right = found
        entry = {
            "settings": self._digest,
            "layers": layers,
            "parts": parts,
            "right": "".join("1" if right[question] else "0" for question in asked),
            **({} if values is right else {"values": [values[question] for question in asked]}),
            "passes": round(passes, 4),
            "seconds": round(seconds, 4),
        }
        self._journal.append(entry)
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        """Know what an entry says."""
        if "error" in entry:
            return  # it is tried again
        check_fields(entry, _ENTRY)
        layers = tuple(entry["layers"])
        if layers == BASE:  # each run of a search that was interrupted has run the base
            self._spent += (entry["passes"], entry["seconds"])
        cost = np.array([0.0, 0.0] if layers == BASE else [entry["passes"], entry["seconds"]]) / len(entry["parts"])
        right = np.array([float(digit) for digit in entry["right"]])
        values = np.array(entry.get("values", right), dtype=np.float64)
        start = 0
        for part in entry["parts"]:
            end = start + len(self._parts[part].questions)
            self._journaled.setdefault(layers, {})[part] = _Answered(values[start:end], right[start:end], cost)
            start = end

    def _come_to(self, layers: LayerSet, parts: Iterable[int]) -> None:
        """Know parts of a combination that are in the journal, count what they cost, and stop if time is up."""
        known = self._known.get(layers, {})
        new = [part for part in parts if part not in known]
        for part in new:
            answered = self._journaled[layers][part]
            self._known.setdefault(layers, {})[part] = answered
            self._spent += answered.cost
        if self.is_complete(layers) and layers not in self._fitness:
            self._fitness[layers] = float(self.values(layers).mean())
            if layers != BASE and (self._best is None or self.ranked([layers, self._best])[0] == layers):
                self._best = layers
        if new and layers != BASE and self._seconds is not None and self._spent[1] > self._seconds:
            raise BudgetSpent

    def _tell(self) -> None:
        """Show how far the search is."""
        done = len(self.order)
        saved = 1 - self._spent[0] / (done * self._total)
        best = None if self._best is None else (self._best, self._fitness[self._best])
        self._progress.evaluated(done, max(0.0, float(saved)), best)

    def _whole(self, layers: LayerSet, which: str) -> Values:
        known = self._known[layers]
        whole = np.empty(len(self._questions.questions))
        for part, found in known.items():
            whole[self._parts[part].questions] = getattr(found, which)
        return whole


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text or type(error).__name__
