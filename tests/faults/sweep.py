"""Faults injected into the scenarios, and what is on the disk after each.

In: scenarios, and a folder to run them in. Out: a `Result` per fault. After every fault:

- The target is unchanged, or whole and new, but never a mix. Where folders cannot be swapped, the old target
  may be in its partial folder.
- Beside the target is nothing but its partial folder and the store of base shards.
- What was read is unchanged.
- A run that was not killed has failed, or its result is right.
- The next run, or `remove_abandoned`, removes the partial folder.
"""

import contextlib
import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model_preparation.checkpoint.base_store import STORE
from model_preparation.io.complete_folder import remove_abandoned
from model_preparation.io.self_checksum import FIELD as SEAL
from tests.faults.injector import KINDS, WRITES_ONLY, Call, Fault, Injector, Outcome, load_shim
from tests.faults.scenarios import SCENARIOS, Models, Scenario, Write, clean, make_models

TARGET = "out"  # its name in every scenario

_TIMES = {"checkpoint_info.json": "creation_time", "metadata.json": "extraction_time"}
_LEFTOVER_CALLS = 30  # `leftover` is killed after so many calls

Contents = dict[str, str]


@dataclass(frozen=True)
class Result:
    """What one fault did.

    Attributes:
        call: the system call it was at; None if the run made fewer than usual, so that nothing was injected.
        state: of the target: "old" (as before; absent, if it was absent before), "new", "aside" (the old one
            is in its partial folder) or "mixed".
        error: the type of the exception the run ended with, "" where there was none.
        violations: what should not be, in words.
    """

    scenario: str
    fault: Fault
    call: Call | None
    state: str
    error: str
    violations: list[str]


class Sweep:
    """Scenarios on the models made in `folder`. Before every fault, the scenario's folder is reset."""

    def __init__(self, folder: Path, scenarios: Mapping[str, Scenario] = SCENARIOS, recover_every: int = 10):
        self.shim = load_shim(folder)
        self.models = make_models(folder / "models")
        self._recover_every = recover_every
        self._runs = 0
        self._ready: dict[Write, Path] = {}
        self.places = {
            name: self._place(name, scenario, folder / f"place{index}")
            for index, (name, scenario) in enumerate(scenarios.items())
        }

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *exception) -> None:
        for place in self.places.values():
            place.close()

    def _place(self, name: str, scenario: Scenario, folder: Path) -> "Place":
        return Place(self, name, scenario, folder)

    def faults(self, seed: int = 0) -> Iterator[tuple[str, Fault]]:
        """Every kind of fault at every call that it fits: one per scenario and kind in turn; then all again.

        This never ends.
        """
        shuffle = random.Random(seed).shuffle
        while True:
            groups = []
            for name, place in self.places.items():
                for kind in KINDS:
                    least_bytes = 2 if kind in WRITES_ONLY else 0
                    places = [at for at, call in enumerate(place.calls) if call.size_bytes >= least_bytes]
                    shuffle(places)
                    groups.append([(name, Fault(kind, at)) for at in places])
            for turn in range(max(map(len, groups))):
                yield from (group[turn] for group in groups if turn < len(group))

    def inject(self, name: str, fault: Fault) -> Result:
        """Run the scenario with the fault, and judge what it left."""
        self._runs += 1
        return self.places[name].inject(fault, recover=self._runs % self._recover_every == 0)

    def ready(self, write: Write) -> Path:
        """The folder that `write` makes where nothing is in its way."""
        if write not in self._ready:
            self._ready[write] = self.models.folder.with_name(f"ready{len(self._ready)}")
            write(self.models, self._ready[write], overwrite=False)
        return self._ready[write]


class Place:
    """Where a scenario runs.

    Attributes:
        calls: what the scenario does to the disk when nothing goes wrong.
    """

    def __init__(self, sweep: Sweep, name: str, scenario: Scenario, folder: Path):
        self.name = name
        self._scenario = scenario
        self._shim = sweep.shim
        self._models: Models = sweep.models
        self._folder = folder
        self._target = folder / self._scenario.parents / TARGET
        self._pristine = folder.with_name(f"{folder.name}.pristine")
        self._pristine.mkdir()
        if self._scenario.old is not None:
            shutil.copytree(sweep.ready(self._scenario.old), self._pristine / TARGET)
        if self._scenario.leftover is not None:
            run = partial(self._scenario.leftover, self._models, self._pristine / TARGET, overwrite=True)
            with self._injector(run, self._pristine) as injector:
                assert injector.run(Fault("killed before", _LEFTOVER_CALLS)).injected
        self._old = contents(self._pristine / TARGET)
        self._read = contents(self._models.folder)
        self._is_pristine = False
        self._reset()
        self._runs = self._injector(partial(self._write, overwrite=self._scenario.old is not None), folder)
        outcome = self._run_undisturbed()
        self.calls = outcome.calls
        self._new = contents(self._target, timeless=True)
        if outcome.code or not self._new or self._beside():
            raise RuntimeError(f"{name} fails without any fault: {self._beside()}\n{outcome.output}")
        self._is_pristine = False
        self._runs_again = self._injector(partial(self._write, overwrite=True), folder)

    def _run_undisturbed(self) -> Outcome:
        self._runs.prepare()
        return self._runs.run()

    def inject(self, fault: Fault, *, recover: bool) -> Result:
        self._reset()
        outcome = self._runs.run(fault)
        state = self._state()
        violations = [*self._wrong_end(fault, outcome, state), *self._wrong_on_disk(state)]
        if contents(self._models.folder) != self._read:
            violations.append("what was only to be read has changed")
        if recover:
            violations += self._wrong_after_recovery()
        elif self._beside():
            violations += self._wrong_after_cleaning(state)
        self._is_pristine = not recover and state == "old" and self._scenario.leftover is None
        call = outcome.calls[fault.at] if outcome.injected else None
        return Result(self.name, fault, call, state, outcome.error, violations)

    def close(self) -> None:
        """End the processes that wait for another run."""
        for runs in (self._runs, self._runs_again):
            runs.__exit__()

    def _injector(self, function: Callable[[], None], folder: Path) -> Injector:
        scenario = self._scenario
        return Injector(self._shim, function, folder, no_exchange=scenario.no_exchange, no_locks=scenario.no_locks)

    def _write(self, *, overwrite: bool) -> None:
        self._scenario.write(self._models, self._target, overwrite=overwrite)

    def _reset(self) -> None:
        if not self._is_pristine:
            shutil.rmtree(self._folder, ignore_errors=True)
            shutil.copytree(self._pristine, self._folder)

    def _state(self) -> str:
        now = contents(self._target)
        if now == self._old:
            return "old"
        if contents(self._target, timeless=True) == self._new:
            return "new"
        aside = [contents(path / "old") for path in self._target.parent.glob(f"{TARGET}.partial*")]
        return "aside" if not now and self._scenario.no_exchange and self._old in aside else "mixed"

    @property
    def _succeeds(self) -> str:
        """The state after a run that succeeds."""
        return "old" if self._scenario.write is clean else "new"

    def _beside(self) -> list[str]:
        """Names of what lies beside the target."""
        parent = self._target.parent
        kept = {TARGET, STORE}  # the store of a base's shards stays for the next build
        return sorted({path.name for path in parent.iterdir()} - kept) if parent.exists() else []

    def _wrong_end(self, fault: Fault, outcome: Outcome, state: str) -> Iterator[str]:
        if not outcome.injected:
            if outcome.code or state != self._succeeds:
                yield f"nothing was injected; it ended with {outcome.code}, target {state}: {outcome.output}"
        elif fault.kind.startswith("killed"):
            if outcome.code != -signal.SIGKILL:
                yield f"it ended with {outcome.code} instead of being killed: {outcome.output}"
        elif outcome.code == 0:
            if state != self._succeeds:
                yield "it claims success"
        elif outcome.code != 1:
            yield f"it ended with {outcome.code}: {outcome.output}"
        elif outcome.error not in ("OSError", "SurgeryError"):
            yield f"it ends with a traceback: {outcome.output}"
        elif state in ("new", "aside") and "from then on" not in fault.kind and "then full" not in fault.kind:
            yield f"it says that it failed, but the target is {state}: {outcome.output}"

    def _wrong_on_disk(self, state: str) -> Iterator[str]:
        if state == "mixed":
            now = contents(self._target)
            odd = sorted(name for name in now.keys() | self._old.keys() if now.get(name) != self._old.get(name))
            yield f"the target is neither the old one nor the new one: {odd}"
        if odd := [name for name in self._beside() if not name.startswith(f"{TARGET}.partial")]:
            yield f"beside the target is {odd}"

    def _wrong_after_recovery(self) -> Iterator[str]:
        """Run the same again, with overwrite and without a fault."""
        outcome = self._runs_again.run()
        if outcome.code:
            yield f"the next run fails: {outcome.output}"
        elif contents(self._target, timeless=True) != self._new:
            yield "the next run leaves something else than usual"
        elif self._beside():
            yield f"the next run leaves {self._beside()} beside the target"

    def _wrong_after_cleaning(self, state: str) -> Iterator[str]:
        remove_abandoned(self._target.parent)
        if self._beside():
            yield f"remove_abandoned leaves {self._beside()}"
        if self._state() != {"aside": "old"}.get(state, state):
            yield f"remove_abandoned makes the {state} target {self._state()}"


def contents(folder: Path, *, timeless: bool = False) -> Contents:
    """What is in a folder: per path, permissions and SHA-256; nothing if there is no folder.

    Args:
        timeless: leave out the creation times in our JSON files, and their checksums.
    """
    if not folder.exists():
        return {}
    found = {}
    for path in [folder, *folder.rglob("*")]:
        what = f"{path.lstat().st_mode:o}"
        if path.is_symlink():
            what += f" {path.readlink()}"
        elif path.is_file():
            data = path.read_bytes()
            if timeless and path.parent == folder and path.name in _TIMES:
                with contextlib.suppress(ValueError):  # it may be half of a file
                    data = json.dumps({**json.loads(data), _TIMES[path.name]: None, SEAL: None}).encode()
            what += f" {hashlib.sha256(data).hexdigest()}"
        found[str(path.relative_to(folder))] = what
    return found
