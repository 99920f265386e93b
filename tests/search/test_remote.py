"""Scoring on a Ray cluster: the same result to the last digit, also when a worker is killed; nothing counts twice."""

import json
import os
import signal
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from model_preparation.jobs.ray_scoring import shards
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import SearchSettings
from tests.conftest import HANG_SECONDS, assert_refused, run_command, start_command, wait_until
from tests.search.conftest import make_questions, write_task

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc"),
    pytest.mark.usefixtures("quick_children"),
]


def test_a_killed_worker_is_replaced_and_the_result_is_that_of_one_process(base_dir, layers_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    task = write_task(tmp_path / "task", "tiny_words", make_questions(60))
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--task", task, "--device", "cpu"]
    flags += ["--method", "exhaustive", "--batch_size", 2]
    alone = run_command("search_layers", *flags, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    with tempfile.TemporaryDirectory(prefix="ray") as ray_files:
        environment = {"RAY_TMPDIR": ray_files}
        args = (*flags, "--output_dir", tmp_path / "ray", "--ray", "local")
        process = start_command("search_layers", *args, log=tmp_path / "log", **environment)
        os.kill(wait_for_a_worker(process, ray_files), signal.SIGKILL)  # before it has told anything
        journal = tmp_path / "ray" / "journal.jsonl"
        wait_for_lines(process, journal, 3)  # the base, and two combinations
        os.kill(wait_for_a_worker(process, ray_files), signal.SIGKILL)
        told = lines_of(journal)
        process.join(HANG_SECONDS)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("A worker was lost") == 2
    assert told < 16 == lines_of(journal)
    found, wanted = (json.loads((tmp_path / name / "search_result.json").read_text()) for name in ("ray", "alone"))
    for name in ("final_results", "base_score", "base_stderr", "pareto", "failed"):
        assert found[name] == wanted[name]
    lines = [json.loads(line) for line in (tmp_path / "ray" / "journal.jsonl").read_text().splitlines()]
    made = [(tuple(line["layers"]), part) for line in lines for part in line["parts"]]
    assert len(made) == len(set(made))


def test_a_gpu_that_torch_cannot_use_is_told_and_nothing_runs_on_the_cpu(base_dir, layers_dir, task_dir, tmp_path):
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--task", task_dir, "--method", "singles"]
    with tempfile.TemporaryDirectory(prefix="ray") as ray_files:
        environment = {"RAY_TMPDIR": ray_files, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        environment |= {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 1, "GPU": 1}), "CUDA_VISIBLE_DEVICES": "0"}
        result = run_command("search_layers", *flags, "--output_dir", tmp_path, "--ray", "local", **environment)
    assert "Device       a GPU from Ray for each job\n" in result.stdout, result.stderr
    assert_refused(result, "A worker of the search failed: --device cuda cannot be used here: ")
    assert lines_of(tmp_path / "journal.jsonl") == 0


def test_batches_are_those_of_the_workers_device_whatever_is_here(base_dir, layers_dir, task_dir):
    settings = SearchSettings(".", str(base_dir), llama_layers_dir=layers_dir, tasks=(str(task_dir),))
    here, there = ScoringSetup(settings), ScoringSetup(settings, scored_on="cuda")
    assert there.recorded["device"] == "cuda"
    assert len(there.questions.batches) < len(here.questions.batches)  # a GPU takes more at once
    assert there.pair.model.device.type == "cpu"


def wait_for_a_worker(process: BaseProcess, ray_files: str) -> int:
    """The process of a worker, as soon as there is one."""
    workers: list[int] = []

    def are_there() -> bool:
        workers[:] = [each.pid for each in psutil.process_iter() if is_shard(each, ray_files)]
        return bool(workers)

    wait_until(are_there, alive=process.is_alive)
    return workers[0]


def wait_for_lines(process: BaseProcess, path: Path, count: int) -> None:
    wait_until(lambda: path.exists() and lines_of(path) >= count, alive=process.is_alive)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def is_shard(process: psutil.Process, ray_files: str) -> bool:
    """A worker's log is among the files of its cluster."""
    try:
        ours = process.name().startswith("ray::QuestionSh")
        return ours and any(file.path.startswith(ray_files) for file in process.open_files())
    except psutil.Error:
        return False


def test_the_shards_are_all_batches_once_and_about_alike(loaded):
    batches = loaded.questions.batches
    for workers in (1, 2, 5, len(batches) + 3):
        found = shards(batches, workers)
        assert sorted(number for shard in found for number in shard) == list(range(len(batches)))
        assert len(found) == min(workers, len(batches))
        sizes = [sum(batches[number].inputs.numel() for number in shard) for shard in found]
        assert max(sizes) - min(sizes) <= max(batch.inputs.numel() for batch in batches)
