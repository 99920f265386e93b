"""A sample of the faults that benchmarks/fault_injection.py injects: what a stopped run leaves on the disk."""

from itertools import islice

import pytest

from tests.faults.injector import KINDS, Fault
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.sweep import Sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    with make_sweep(tmp_path_factory.mktemp("faults"), SCENARIOS) as sweep:
        yield sweep


def make_sweep(folder, scenarios) -> Sweep:
    try:
        return Sweep(folder, scenarios)
    except RuntimeError as error:
        if not str(error).startswith("needs "):
            raise
        pytest.skip(str(error))


def test_a_stopped_run_leaves_the_old_or_the_new_folder(sweep):
    """Every kind and every scenario comes at least once.

    benchmarks/fault_injection.py injects each kind into each scenario.
    """
    faults = islice(sweep.faults(seed=3), 0, len(KINDS) * len(SCENARIOS), 5)  # they come by scenario, then by kind
    results = [sweep.inject(*fault) for fault in faults]
    assert [str(result) for result in results if result.violations] == []
    injected = [result for result in results if result.call is not None]
    assert len(injected) > 0.9 * len(results)  # threads change the order of calls
    assert {result.scenario for result in results} == SCENARIOS.keys()
    assert {result.fault.kind for result in injected} == KINDS.keys()
    assert {result.state for result in injected} >= {"old", "new"}


def test_between_the_two_renames_where_folders_cannot_be_swapped(sweep):
    """The old folder is in the partial folder a moment. The next run or `remove_abandoned` moves it back."""
    name = "build, overwrite, no exchange"
    calls = sweep.places[name].calls
    [second] = [at for at, call in enumerate(calls) if call.name == "rename" and call.path.name == "out"]
    result = sweep.inject(name, Fault("killed before", second))
    assert (result.state, result.violations) == ("aside", [])


def test_a_failing_sync_after_the_swap_takes_it_back(sweep):
    name = "build, overwrite"
    calls = sweep.places[name].calls
    [swap] = [at for at, call in enumerate(calls) if call.name == "renameat2"]
    assert calls[swap + 1].name == "fsync"
    result = sweep.inject(name, Fault("EIO once", swap + 1))
    assert (result.state, result.error, result.violations) == ("old", "OSError", [])


def test_everything_is_synced_in_order(sweep):
    """Files are synced, then checkpoint_info.json, then folders. After the swap, both parents are synced.

    The old folder is deleted last.
    """
    calls = [(call.name, call.path) for call in sweep.places["build, overwrite"].calls]
    new = next(path for name, path in calls if path.name == "new")
    synced = {path: at for at, (name, path) in enumerate(calls) if name == "fsync" and new in [path, *path.parents]}
    swap = calls.index(("renameat2", new.parent.parent / "out"))
    mark = synced[new / "checkpoint_info.json"]
    written = {path for name, path in calls[:swap] if name in ("write", "pwrite64") and new in path.parents}
    assert written < synced.keys()
    assert {new / "tokenizer" / "tokenizer.json", new / "README.md", new / "model.pt"} < synced.keys()
    assert all(synced[path] < mark for path in written if path.name != "checkpoint_info.json")
    assert mark < synced[new / "tokenizer"] < synced[new] < swap
    after = calls[swap + 1 :]
    assert after[:2] == [("fsync", new.parent.parent), ("fsync", new.parent)]
    assert after[2][0] == "unlinkat"


def test_a_writer_that_is_not_safe_is_found_out(tmp_path):
    """The harness itself: files that are overwritten in place are seen half old, half new."""

    def write_in_place(models, target, *, overwrite):
        target.mkdir(exist_ok=True)
        for name in ("a.txt", "b.txt"):
            (target / name).write_text(f"{name} written {overwrite}")

    scenario = Scenario(write_in_place, old=write_in_place)
    with make_sweep(tmp_path, {"in place": scenario}) as sweep:
        count = len(sweep.places["in place"].calls)
        results = [sweep.inject("in place", Fault("killed before", at)) for at in range(count)]
        results.append(sweep.inject("in place", Fault("half written, then full", count - 1)))
    assert ["mixed" if result.violations else result.state for result in results] == ["old", "old", *["mixed"] * 4]
