"""The journal: what was added is there after any crash, and only a whole line is taken for an entry."""

import os
import resource
import signal

import pytest

from model_preparation.errors import SurgeryError
from model_preparation.search.journal import Journal

ENTRIES = [{"layers": [number], "right": "0110" * number} for number in range(4)]


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "folder" / "journal.jsonl")
    for entry in ENTRIES:
        journal.append(entry)
    journal.close()
    return journal.path


def entries_of(path):
    journal = Journal(path)
    journal.close()
    return journal.entries


def test_it_gives_back_what_was_added(path):
    assert entries_of(path) == ENTRIES


def test_a_torn_last_line_is_taken_off_and_the_next_one_stands_by_itself(path):
    data = path.read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(data[:-cut])
        assert entries_of(path) == ENTRIES[:3]
    path.write_bytes(data[:-9])
    journal = Journal(path)
    journal.append(ENTRIES[3])
    journal.close()
    assert path.read_bytes() == data


def test_a_last_line_with_a_block_that_was_not_on_the_disk_is_taken_off(path):
    """A power cut can cause this: the bytes of a block that was not written are zeros."""
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for start, end in ((last, last + 5), (last + 5, len(data) - 3), (last, len(data))):
        path.write_bytes(data[:start] + bytes(end - start) + data[end:])
        assert entries_of(path) == ENTRIES[:3]
        assert path.read_bytes() == data[:last]


def test_any_changed_byte_is_a_damaged_line(path):
    data = path.read_bytes()
    for place in range(0, len(data) - 1, 7):
        if data[place] == ord("\n"):
            continue
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(SurgeryError, match=r"Line \d of .* is damaged"):
            entries_of(path)


def test_two_searches_do_not_write_to_one_journal(path):
    journal = Journal(path)
    with pytest.raises(SurgeryError, match="Another search writes to"):
        Journal(path)
    journal.close()
    assert entries_of(path) == ENTRIES


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half_behind(path):
    size = path.stat().st_size
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        journal = Journal(path)
        try:
            journal.append(ENTRIES[1])
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.stat().st_size == size
    assert entries_of(path) == ENTRIES


def test_what_was_added_before_a_kill_is_there(path):
    child = os.fork()
    if child == 0:
        Journal(path).append({"layers": [9]})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert entries_of(path) == [*ENTRIES, {"layers": [9]}]
