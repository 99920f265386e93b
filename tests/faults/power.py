"""Power cuts in the scenarios and in longer work, and what is on the disk after each.

In: scenarios, works, and a folder to run them in. Out: a `Result` per state of the disk that a cut may leave (disk.py).
The checks after a cut: a folder is the old or the new one, never a mix. What was printed as done is there.
What counts as complete is complete. The same command again ends as if there had been no cut.
"""

import random
import shutil
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model_preparation import load_checkpoint, verify_checkpoint
from model_preparation.checkpoint.base_store import STORE, StoredShard
from model_preparation.checkpoint.checkpoint_info import INFO
from model_preparation.checkpoint.layer_store import METADATA, LayerStore
from model_preparation.errors import SurgeryError
from model_preparation.io.digests import sha256_of
from tests.faults.disk import FILE_SYSTEMS, Cut, Disk, Tree, digest_of, put
from tests.faults.injector import Injector, Outcome
from tests.faults.long_work import WORKS, Work
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.sweep import Place, Sweep, contents

_TRIES = 200  # draws without anything new, after which a scenario is done


@dataclass(frozen=True)
class Result:
    """What one cut did.

    Attributes:
        found: for a folder, "old" (as before; absent, if it was absent before), "new", "aside" (the old one is
            in its partial folder) or "mixed". For a work, "".
        again: whether the same command was run again.
        violations: what should not be, in words.
    """

    scenario: str
    system: str
    cut: Cut
    found: str
    again: bool
    violations: list[str]


class PowerSweep(Sweep):
    """Scenarios and works on the models made in `folder`, and what power cuts leave of them.

    Args:
        again: after what share of the states of a new shape the same command is run again. The shape is which
            files there are, and which are whole. Of the other states, it is a tenth of this share. After a
            scenario's first state, the command is always run again.
    """

    def __init__(
        self,
        folder: Path,
        scenarios: Mapping[str, Scenario] = SCENARIOS,
        works: Mapping[str, Work] = WORKS,
        again: float = 0.15,
    ):
        super().__init__(folder, scenarios)
        works_places = {name: WorkPlace(self, name, work, folder / f"work {name}") for name, work in works.items()}
        self.cut_places: dict[str, FolderPlace | WorkPlace] = {**self.places, **works_places}  # type: ignore[dict-item]
        self._again = again

    def __exit__(self, *exception) -> None:
        for place in self.cut_places.values():
            place.close()

    def _place(self, name: str, scenario: Scenario, folder: Path) -> "FolderPlace":
        return FolderPlace(self, name, scenario, folder)

    def results(self, seed: int = 0, names: Collection[str] | None = None) -> Iterator[Result]:
        """Check the scenarios in turns, until no new state is found.

        A state is the files there and the number of lines printed before. It is checked once per scenario.

        Args:
            names: of the scenarios; None for all.
        """
        chance = random.Random(seed)
        running = {
            (name, system): self._cuts(name, system, chance)
            for name in self.cut_places
            for system in FILE_SYSTEMS
            if names is None or name in names
        }
        seen: set[Hashable] = set()
        while running:
            for key, cuts in list(running.items()):
                result = self._next(*key, cuts, seen, chance)
                if result is None:
                    del running[key]
                else:
                    yield result

    def _cuts(self, name: str, system: str, chance: random.Random) -> Iterator[Cut]:
        """First the least that may be left after each line printed, the last one first; then whatever is drawn."""
        disk = self.cut_places[name].disk
        for at, _ in reversed(disk.said):
            yield disk.least(FILE_SYSTEMS[system], at)
        while True:
            yield disk.draw(FILE_SYSTEMS[system], chance)

    def _next(
        self, name: str, system: str, cuts: Iterator[Cut], seen: set[Hashable], chance: random.Random
    ) -> Result | None:
        place = self.cut_places[name]
        for _ in range(_TRIES):
            cut = next(cuts)
            tree = place.disk.tree(FILE_SYSTEMS[system], cut)
            said = [text.strip() for at, text in place.disk.said if at <= cut.at]
            state = (name, digest_of(tree), len(said))
            if state in seen:
                continue
            shape = (name, *place.disk.shape(tree))
            again = name not in seen or chance.random() < place.share_again * self._again * (
                0.1 if shape in seen else 1
            )
            found = place.known_state(tree, said) if shape in seen and not again else None
            seen |= {state, name, shape}
            if found is not None:
                return Result(name, system, cut, found, False, [])
            place.lay_out(tree)
            found, violations = place.check(said)
            if again and not violations:
                place.lay_out(tree)
                violations = list(place.run_again())
            return Result(name, system, cut, found, again, violations)
        return None


class FolderPlace(Place):
    """Where a scenario runs.

    Attributes:
        disk: all that it does when there is no cut.
    """

    disk: Disk
    share_again = 1.0

    def lay_out(self, tree: Tree) -> None:
        _lay_out(tree, self._folder)
        self._is_pristine = False

    def known_state(self, tree: Tree, said: list[str]) -> str | None:
        """The state of the target, if it is as before or after and fits what was printed; otherwise None.

        Only for trees of a shape that was checked before, because this does not look beside the target.
        """
        place = self._target.relative_to(self._folder).as_posix()
        if self._before_and_after is None:
            trees = (self.disk.least(FILE_SYSTEMS["ext4"], 0), self.disk.end())
            self._before_and_after = [digest_of(self.disk.tree(FILE_SYSTEMS["ext4"], cut), place) for cut in trees]
        now = digest_of(tree, place)
        if now not in self._before_and_after:
            return None
        state = "old" if now == self._before_and_after[0] else "new"
        return None if "done" in said and state != self._succeeds else state

    def check(self, said: list[str]) -> tuple[str, list[str]]:
        """(state of the target, what is wrong)."""
        state = self._state()
        violations = [*self._wrong_on_disk(state), *self._wrong_in_store()]
        if "done" in said and state != self._succeeds:
            violations.append(f"it was done, but the target is {state}")
        if not violations:
            violations += self._wrong_inside()
            if self._beside():
                violations += self._wrong_after_cleaning(state)
        return state, violations

    def run_again(self) -> Iterator[str]:
        yield from self._wrong_after_recovery()

    def _run_undisturbed(self) -> Outcome:
        self._checked: set[tuple] = set()
        self._before_and_after: list[str] | None = None
        self.disk, outcome = _record(self._runs, self._folder)
        return outcome

    def _write(self, *, overwrite: bool) -> None:
        super()._write(overwrite=overwrite)
        print("done")

    def _wrong_inside(self) -> Iterator[str]:
        """Of what counts as complete, the faults that the program itself finds."""
        found = tuple(sorted(contents(self._target).items()))
        if found in self._checked:
            return
        self._checked.add(found)
        if (self._target / INFO).is_file():
            yield from map(str, verify_checkpoint(self._target))
            load_checkpoint(self._target)
        elif (self._target / METADATA).is_file():
            yield from LayerStore(self._target).faults()

    def _wrong_in_store(self) -> Iterator[str]:
        """A build does not read a shard of the right size that has a record. So the digest must be right."""
        for shard in (self._target.parent / STORE).glob("*/*.safetensors"):
            known = StoredShard.recorded(shard)
            if known is not None and shard.stat().st_size == known.bytes and sha256_of(shard) != known.digest:
                yield f"{shard} is not as its record says"


class WorkPlace:
    """Where a work is done."""

    def __init__(self, sweep: PowerSweep, name: str, work: Work, folder: Path):
        self._work = work
        self.share_again = work.share_again
        self._folder = folder
        work.start(sweep.models, folder)
        self._injector = Injector(sweep.shim, partial(work.run, sweep.models, folder), folder)
        self.disk, outcome = _record(self._injector, folder)
        if outcome.code:
            raise RuntimeError(f"{name} fails without any cut:\n{outcome.output}")
        self._result = work.result(folder)

    def lay_out(self, tree: Tree) -> None:
        _lay_out(tree, self._folder)

    def known_state(self, tree: Tree, said: list[str]) -> None:
        """None: the shape of a tree does not say what a work kept."""

    def check(self, said: list[str]) -> tuple[str, list[str]]:
        try:
            return "", list(self._work.faults(self._folder, said))
        except (SurgeryError, OSError, ValueError, KeyError) as error:
            return "", [f"{type(error).__name__}: {error}"]

    def close(self) -> None:
        self._injector.__exit__()

    def run_again(self) -> Iterator[str]:
        outcome = self._injector.run()
        if outcome.code:
            yield f"the next run fails: {outcome.output}"
        elif self._work.result(self._folder) != self._result:
            yield f"the next run ends with {self._work.result(self._folder)} instead of {self._result}"


def _record(injector: Injector, folder: Path) -> tuple[Disk, Outcome]:
    disk = Disk(folder)
    outcome, notes = injector.record()
    disk.take(notes)
    if not outcome.code:
        replayed = disk.tree(FILE_SYSTEMS["ext4"], disk.end())
        after = Disk(folder)
        found = after.tree(FILE_SYSTEMS["ext4"], after.end())
        if replayed != found:
            odd = [name for name in replayed.keys() | found.keys() if replayed.get(name) != found.get(name)]
            raise RuntimeError(f"Something was changed without a note of it: {odd}")
    return disk, outcome


def _lay_out(tree: Tree, folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    put(tree, folder)
