"""Many evaluations one after the other: which checkpoints are found, what is run for each, what the table says."""

import os
import signal
import subprocess
import sys

import pytest

from model_preparation.errors import SurgeryError
from model_preparation.jobs import evaluate_many, jobs
from model_preparation.jobs.combinations import Combination
from model_preparation.jobs.evaluate_many import Candidate, evaluate_all, find_checkpoints
from tests.conftest import HANG_SECONDS, wait_until
from tests.jobs.conftest import FAKE_EVALUATOR
from tests.jobs.fake_evaluator import SUBJECTS


def test_each_is_evaluated_kept_or_failed_and_none_stops_the_others(make_candidate, tmp_path, capsys):
    folders = [
        make_candidate("good", (0, 2)),
        make_candidate("bad", behaviour="fail"),
        make_candidate("silent", behaviour="silent"),
        tmp_path / "checkpoints" / "unbuilt",
        make_candidate("last"),
    ]
    evaluate_all([Candidate(folders[-1])], evaluator=FAKE_EVALUATOR)
    done = evaluate_all(list(map(Candidate, folders)), ["--limit", "3"], evaluator=FAKE_EVALUATOR)

    assert [(one.name, one.status) for one in done] == [
        ("good", "evaluated"),
        ("bad", "failed"),
        ("silent", "failed"),
        ("unbuilt", "failed"),
        ("last", "kept"),
    ]
    assert done[0].layers == (0, 2)
    assert done[0].questions == 3 * len(SUBJECTS)
    assert done[1].note == "the logits are not finite. Build it again."
    assert "without a result" in done[2].note
    assert "unbuilt is not there" in done[3].note
    printed = capsys.readouterr()
    assert "error: the logits are not finite" in printed.err
    heading, *rows = evaluate_many.describe(done).splitlines()
    assert heading.split() == ["name", "layers", "score", "questions", "seconds", "status", "note"]
    assert rows[0].split()[:6] == ["good", "0", "2", f"{done[0].score:.4f}", "±", "0.0100"]
    assert rows[1].split()[:3] == ["bad", "1", "3"]
    assert rows[1].endswith("failed     the logits are not finite. Build it again.")


def test_of_several_tasks_each_score_is_told(make_candidate):
    (done,) = evaluate_all([Candidate(make_candidate("one"))], ["--tasks", "a", "b"], evaluator=FAKE_EVALUATOR)
    assert (done.status, done.score, done.stderr) == ("evaluated", None, None)
    assert done.note == "a 0.2500; b 0.2500"


def test_results_go_to_a_folder_for_each(make_candidate, tmp_path):
    folders = [make_candidate("one"), make_candidate("two")]
    evaluate_all(list(map(Candidate, folders)), results_dir=tmp_path / "results", evaluator=FAKE_EVALUATOR)
    for name in ("one", "two"):
        assert (tmp_path / "results" / name / "algebra.json").exists()
        assert not (tmp_path / "checkpoints" / name / "evaluations").exists()


def test_two_of_one_name_cannot_share_a_results_folder(make_candidate, tmp_path):
    folder = make_candidate("one")
    with pytest.raises(SurgeryError, match="2 checkpoints are named one"):
        evaluate_all([Candidate(folder), Candidate(folder)], results_dir=tmp_path, evaluator=FAKE_EVALUATOR)


def test_a_folder_of_checkpoints_stands_for_the_complete_ones(make_candidate, tmp_path):
    first, second = make_candidate("a"), make_candidate("b")
    make_candidate("c.partial")
    (tmp_path / "checkpoints" / "d").mkdir()
    found = find_checkpoints([second, tmp_path / "checkpoints", first])
    assert [candidate.folder for candidate in found] == [second, first]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_checkpoints_is_refused_before_anything_runs(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SurgeryError, match=name):
        find_checkpoints([tmp_path / name])


def test_a_checkpoint_of_other_layers_than_listed_is_not_evaluated(make_candidate, tmp_path):
    make_candidate("mine", (1, 2))
    listed = evaluate_many.listed_checkpoints([Combination((1, 3), "", "", "mine")], tmp_path / "checkpoints")
    [done] = evaluate_all(listed, evaluator=FAKE_EVALUATOR)
    assert done.status == "failed"
    assert "are 1 2, not those of the list" in done.note


def test_a_process_that_was_killed_is_told_from_one_that_failed():
    assert "signal 9" in jobs.failure(-9, "50 of 57\n")
    assert jobs.failure(3, "one\ntwo\n") == "exit code 3: two"
    assert jobs.failure(1, "error: first.\nerror: second.\nbye\n") == "second."
    assert jobs.failure(0, "error: of no account\n") == ""


def test_an_interruption_ends_the_one_that_runs_and_lets_it_clean_up(make_candidate, tmp_path):
    folder = make_candidate("slow", behaviour="wait")
    with fake_batch(folder) as process:
        wait_for(folder / "evaluations" / "waiting")
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_SECONDS) != 0
    assert (folder / "evaluations" / "cleaned").exists()
    assert not is_alive(attempts(folder)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_batch_that_is_killed_leaves_nothing_running(make_candidate):
    folder = make_candidate("slow", behaviour="wait")
    with fake_batch(folder) as process:
        wait_for(folder / "evaluations" / "waiting")
        process.kill()
    wait_until(lambda: not is_alive(attempts(folder)[0]))
    assert not (folder / "evaluations" / "cleaned").exists()


def fake_batch(folder) -> subprocess.Popen:
    code = (
        "from pathlib import Path\n"
        "from model_preparation.jobs.evaluate_many import Candidate, evaluate_all\n"
        f"evaluate_all([Candidate(Path({str(folder)!r}))], evaluator=Path({str(FAKE_EVALUATOR)!r}))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(evaluate_many.EVALUATOR)], start_new_session=True)


def attempts(folder) -> list[int]:
    """The process ids of the stand-in's runs for a checkpoint."""
    return list(map(int, (folder / "evaluations" / "attempts").read_text().split()))


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_for(path) -> None:
    wait_until(path.exists)
