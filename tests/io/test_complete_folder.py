"""A new folder appears whole or not at all, even if several processes write the same folder."""

import errno
import fcntl
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model_preparation.errors import SurgeryError
from model_preparation.io import complete_folder as module
from model_preparation.io.complete_folder import check_space, new_folder, remove_abandoned
from tests.conftest import HANG_SECONDS, wait_until

MARK = "done.json"


def write(target: Path, text: str, *, overwrite: bool = True, pause: Callable[[], object] = lambda: None) -> None:
    """Make `target` of three files that all say `text`; `pause` is called while it is half written."""
    with new_folder(target, overwrite=overwrite, marker_file=MARK) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a.txt").write_text(text)
        pause()
        (staging / "b.txt").write_text(text)
        (staging / MARK).write_text(text)


def read(target: Path) -> set[str]:
    """The texts in `target`, which has all of `write`'s files and no others."""
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found.keys() == {"sub/a.txt", "b.txt", MARK}
    return set(found.values())


def forked(function: Callable[[], object]) -> int:
    """Run `function` in a process of its own, which ends with 0, or 1 for a SurgeryError; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 2
    try:
        signal.alarm(HANG_SECONDS)
        function()
        code = 0
    except SurgeryError:
        code = 1
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def half_written(tmp_path):
    """(target, id of a process that has half written it and will not go on)."""
    target = tmp_path / "out"
    reading, writing = os.pipe()

    def wait() -> None:
        os.write(writing, b"!")
        signal.pause()

    child = forked(lambda: write(target, "never", pause=wait))
    assert os.read(reading, 1) == b"!"
    yield target, child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its id stays taken until the fixture ends


def test_a_second_run_says_who_is_at_it(half_written):
    target, child = half_written
    with pytest.raises(SurgeryError, match=rf"out is being written by process {child} on .* since \d.*Wait"):
        write(target, "second")
    assert remove_abandoned(target.parent) == []
    assert [path.name for path in target.parent.iterdir()] == ["out.partial"]
    kill(child)
    write(target, "second")
    assert read(target) == {"second"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_killed_run_s_folder_can_be_removed(half_written):
    target, child = half_written
    kill(child)
    assert remove_abandoned(target.parent) == [target.parent / "out.partial"]
    assert not list(target.parent.iterdir())


def test_what_a_killed_run_left_does_not_count_as_used_space(half_written, monkeypatch):
    target, child = half_written
    kill(child)
    (target.parent / "out.partial" / "new" / "big").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: module.shutil._ntuple_diskusage(0, 0, 1000))
    check_space(target, 1 << 20)
    with pytest.raises(SurgeryError, match="are free"):
        check_space(target, 2 << 20)


def test_many_runs_over_each_other_never_break_the_result(tmp_path):
    target = tmp_path / "out"
    write(target, "first")

    def write_often(number: int) -> None:
        chance = random.Random(number)
        done = 0
        while done < 8:
            try:
                write(target, f"{number}.{done}", pause=lambda: time.sleep(chance.random() / 500))
                done += 1
            except SurgeryError as error:
                if "is being written" not in str(error):
                    raise
            assert (target / MARK).exists()  # whoever writes, something whole is there
            if chance.random() < 0.2:
                remove_abandoned(tmp_path)

    children = [forked(lambda number=number: write_often(number)) for number in range(4)]
    while any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None for child in children):
        assert (target / MARK).exists()
    assert [exit_code(child) for child in children] == [0] * 4
    assert len(read(target)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_appears_meanwhile_is_not_replaced_unasked(tmp_path, monkeypatch):
    """Between the first check and the lock, and while the new one is being written."""
    target = tmp_path / "out"
    take = module.take

    def take_late(target):
        monkeypatch.setattr(module, "take", take)
        write(target, "faster")
        return take(target)

    monkeypatch.setattr(module, "take", take_late)
    with pytest.raises(SurgeryError, match="exists already"):
        write(target, "slower", overwrite=False, pause=lambda: pytest.fail("it began all the same"))
    assert read(target) == {"faster"}

    def appear() -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").write_text("years of work")

    with pytest.raises(SurgeryError, match=r"other files \(thesis\.tex\)"):
        write(tmp_path / "other", "new", pause=appear)
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_partial_folder_that_is_not_ours_is_left_alone(tmp_path):
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "download").write_text("half of it")
    (tmp_path / "link.partial").symlink_to(theirs)
    (tmp_path / "notes.partial").write_text("a file")
    (tmp_path / "empty.partial").mkdir()  # what a run killed at its very beginning leaves
    for name in ("out", "link", "notes"):
        with pytest.raises(SurgeryError, match=r"\.partial is in the way"):
            write(tmp_path / name, "new")
    assert remove_abandoned(tmp_path) == [tmp_path / "empty.partial"]
    assert (theirs / "download").read_text() == "half of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.partial", "notes.partial", "out.partial"]


def test_the_partial_folder_is_deleted_and_taken_by_another_meanwhile(tmp_path):
    target = tmp_path / "out"

    def delete_and_let_another_in() -> None:
        module.shutil.rmtree(tmp_path / "out.partial")
        others.append(forked(lambda: write(target, "theirs", pause=signal.pause)))
        wait_until((tmp_path / "out.partial" / "new" / "sub" / "a.txt").exists)

    others: list[int] = []
    with pytest.raises(SurgeryError, match="was deleted while it was in use"):
        write(target, "ours", pause=delete_and_let_another_in)
    assert not target.exists()
    assert (tmp_path / "out.partial" / "new" / "sub" / "a.txt").read_text() == "theirs"
    os.kill(others[0], signal.SIGKILL)
    assert exit_code(others[0]) == -signal.SIGKILL


def test_without_locks_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """The folders of this host's dead processes are removed. Folders that may still be in use stay."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    target = tmp_path / "out"
    killed = forked(lambda: write(target, "x", pause=lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert exit_code(killed) == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith("out.partial-")
    assert left.name.endswith(f"-{killed}")
    running = left.with_name(f"{left.name.removesuffix(str(killed))}{os.getppid()}")
    elsewhere = left.with_name(f"out.partial-elsewhere-{killed}")
    for folder in (running, elsewhere):
        module.shutil.copytree(left, folder)

    def write_again() -> None:
        with pytest.raises(SurgeryError, match=f"written by process {os.getpid()} "):
            write(target, "inner")

    write(target, "outer", pause=write_again)
    assert read(target) == {"outer"}
    assert set(tmp_path.iterdir()) == {target, running, elsewhere}


@pytest.mark.parametrize(("error", "kind"), [(ValueError, OSError), (SurgeryError, SurgeryError)])
def test_a_library_s_error_of_the_disk_becomes_one_and_a_sentence_of_ours_stays(tmp_path, error, kind):
    with pytest.raises(kind) as raised, new_folder(tmp_path / "new", overwrite=False, marker_file="mark"):
        raise error("No tokenizer can be loaded (os error 28).")
    assert type(raised.value) is kind
