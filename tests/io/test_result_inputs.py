"""What a result was computed from: what differs is named, and a large file that has not changed is not read again."""

import io
import os
import threading
import time

import pytest
import rich
from rich.console import Console

from model_preparation.io import known_digests
from model_preparation.io.result_inputs import differences, digests_of_files


def test_what_differs_is_named_in_one_form():
    there = {"limit": 5, "weights": "0" * 64, "layers": [1, 3], "mixer": {"d_state": 8}, "race": True, "seed": 1}
    now = {"limit": None, "weights": "1" * 64, "layers": [1], "mixer": {}, "race": False, "seed": 1, "code": "2" * 64}
    assert differences(there, now) == [
        "code: was not given, is now given",
        "layers: was 1 3, is now 1",
        "limit: was 5, is now not given",
        "mixer d_state: was 8, is now not given",
        "race: was on, is now off",
        "weights: the content has changed",
    ]
    assert differences(there, there) == []
    assert differences({"weights": "0" * 64}, now, of_both=True) == ["weights: the content has changed"]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file so large that its digest is remembered. It seems to have changed a minute ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 60)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(1 << 24))
    return path


def test_a_large_file_is_read_again_only_when_it_has_changed(large, monkeypatch):
    read, blake3_of = [], known_digests.blake3_of
    monkeypatch.setattr(known_digests, "blake3_of", lambda path: read.append(path) or blake3_of(path))
    before = digests_of_files([large])
    assert digests_of_files([large]) == before
    assert read == [large]
    times = large.stat()
    with large.open("r+b") as file:  # in place, with the time set back
        file.write(b"1")
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests_of_files([large]) != before
    renamed = large.rename(large.with_name("other.bin"))
    assert digests_of_files([renamed])["other.bin"] != before["weights.bin"]
    assert len(read) == 3


@pytest.mark.parametrize("damage", ["{", '{"look": 1}', "[]"])
def test_a_damaged_record_is_none(large, tmp_path, damage):
    before = digests_of_files([large])
    [record] = (tmp_path / "cache").rglob("*.json")
    record.write_text(damage)
    assert digests_of_files([large]) == before
    assert record.read_text() != damage


def test_a_failure_ends_the_bar_and_its_thread(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, force_terminal=True))
    (tmp_path / "a").touch()
    before = threading.enumerate()
    with pytest.raises(FileNotFoundError) as failure:  # it keeps the frames: freeing them would end the bar
        digests_of_files([tmp_path / "a", tmp_path / "b"])
    assert failure.value.filename == str(tmp_path / "b")
    assert "Reading what has changed" in shown.getvalue()
    for thread in set(threading.enumerate()) - set(before):
        thread.join(10)
        assert not thread.is_alive()
