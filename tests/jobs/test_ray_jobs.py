"""Jobs on a Ray cluster of two workers: same results, a killed worker costs one subject, nothing is left running.

The cluster is what `--ray local` starts, with two CPUs and a GPU that torch cannot use. It runs in a child of this
process, as do the batches, so that Ray never gets into the process that runs the tests.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from model_preparation import evaluate_checkpoint
from model_preparation.evaluation.mmlu_questions import SUBJECTS as MMLU_SUBJECTS
from model_preparation.jobs.evaluate_many import Candidate, evaluate_all
from model_preparation.search import report
from tests.conftest import HANG_SECONDS, PACKAGE, assert_refused, run_command, run_python, start_command, wait_until
from tests.evaluation.test_mmlu import question, write_questions
from tests.jobs.conftest import FAKE_EVALUATOR
from tests.jobs.fake_evaluator import SUBJECTS
from tests.jobs.test_evaluate_many import is_alive, wait_for
from tests.search.conftest import make_questions, write_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """HOST:PORT of a cluster of two CPUs and a GPU; when it has ended, none of its processes is left."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory(prefix="ray") as ray_files:
        environment.setenv("RAY_TMPDIR", ray_files)  # a short path, for the sockets in it
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", "0" * 64)  # the tests' other processes use the same token
        # Else the other processes would not look for the cluster on the loopback.
        environment.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        yield from running_cluster(folder)


def running_cluster(folder: Path) -> Iterator[str]:
    def serve() -> None:
        from model_preparation.jobs.ray_cluster import cluster

        os.environ |= {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2, "GPU": 1}), "CUDA_VISIBLE_DEVICES": "0"}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with contextlib.suppress(SystemExit), cluster("local", 2) as ray:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            (folder / "new").write_text(ray.get_runtime_context().gcs_address)
            (folder / "new").rename(folder / "address")
            while True:
                signal.pause()

    server = fork(serve, folder / "log")
    wait_until((folder / "address").exists)
    gcs = (folder / "address").read_text()
    assert processes_of(gcs)
    yield gcs
    os.kill(server, signal.SIGTERM)
    assert os.waitpid(server, 0)[1] == 0, (folder / "log").read_text()
    wait_until(lambda: not processes_of(gcs))


def fork(function: Callable[[], None], log: Path) -> int:
    """Run a function in a child of this process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.alarm(2 * HANG_SECONDS)  # the cluster lasts as long as this file's tests
            function()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def processes_of(gcs: str) -> dict[str, str]:
    """The command lines of processes of the cluster at this address, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if gcs in line or (f"--port={gcs.rpartition(':')[2]}" in line and "gcs_server" in line):
                found[path.parent.name] = line
    return found


def test_a_cluster_that_cannot_start_is_not_advised_to_start_one(tmp_path):
    code = """
import ray, sys
from model_preparation.errors import SurgeryError
from model_preparation.jobs.ray_cluster import cluster
def fail(**_):
    raise Exception("too slow")
ray.init = fail
for address in sys.argv[1:]:
    try:
        with cluster(address):
            pass
    except SurgeryError as error:
        print(error)
"""
    result = run_python("-c", code, "local", "10.0.0.1:6379", cwd=PACKAGE.parent)
    assert result.stdout.splitlines() == [
        "No Ray cluster could be started (Exception: too slow). Try again, or leave --ray out.",
        "No Ray cluster could be joined at 10.0.0.1:6379 (Exception: too slow). Use --ray local, or start one on this "
        "machine: ray start --head",
    ], result.stderr


def test_a_cluster_of_our_own_listens_on_the_loopback_only(address):
    """Compares the open sockets of the cluster's processes with the kernel's list of listening sockets."""
    listening = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    held = [path for pid in processes_of(address) for path in Path(f"/proc/{pid}/fd").iterdir()]
    addresses = []
    for path in held:
        with contextlib.suppress(OSError):  # closed just now
            addresses.append(listening.get(os.readlink(path)))
    found = set(addresses) - {None}
    assert found
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}, found


def evaluate_on(address: str, folders: list[Path], results_dir: Path, log: Path) -> int:
    """Start evaluate_all on the cluster; the result goes to `results_dir` plus ".json". Returns the pid."""

    def batch() -> None:
        from model_preparation.jobs.ray_jobs import RayRunner

        done = evaluate_all(
            list(map(Candidate, folders)),
            results_dir=results_dir,
            run_jobs=RayRunner(address, device="cpu", max_retries=1),
            evaluator=FAKE_EVALUATOR,
        )
        results_dir.with_suffix(".json").write_text(json.dumps([vars(one) for one in done]))

    return fork(batch, log)


def test_a_killed_worker_costs_one_subject_and_changes_no_score(address, make_candidate, tmp_path):
    folders = [
        make_candidate("steady", behaviour="remove gone"),
        make_candidate("cut", behaviour="kill 3 once"),
        make_candidate("bad", behaviour="fail"),
        make_candidate("hopeless", behaviour="kill 2 always"),
        make_candidate("gone"),  # deleted before a worker is free for it
    ]
    results, log = tmp_path / "results", tmp_path / "log"
    process = evaluate_on(address, folders, results, log)
    assert os.waitpid(process, 0)[1] == 0, log.read_text()
    done = {row["name"]: row for row in json.loads(results.with_suffix(".json").read_text())}
    assert list(done) == ["steady", "cut", "bad", "hopeless", "gone"]

    for folder in folders[:2]:
        (folder / "behaviour").write_text("run")
    uninterrupted = {"results_dir": tmp_path / "uninterrupted", "evaluator": FAKE_EVALUATOR}
    for expected in evaluate_all(list(map(Candidate, folders[:2])), **uninterrupted):
        assert done[expected.name]["status"] == "evaluated"
        assert done[expected.name]["score"] == expected.score
        assert done[expected.name]["questions"] == expected.questions

    def attempts(name: str) -> list[int]:
        path = results / name / "attempts"
        return list(map(int, path.read_text().split())) if path.exists() else []

    assert (results / "cut" / "scored").read_text().split() == list(SUBJECTS)  # each once
    # A command that fails is not run again. A command whose worker is lost is run again, here once.
    assert [len(attempts(name)) for name in done] == [1, 2, 1, 2, 0]
    assert not any(is_alive(process) for name in done for process in attempts(name))
    printed = log.read_text()
    assert "cut: its worker on" in printed
    assert "(1 of 1 retries)" in printed
    assert "  | error: the logits are not finite." in printed
    assert done["bad"]["note"] == "the logits are not finite. Build it again."
    assert "its worker was lost 2 times" in done["hopeless"]["note"]
    assert f"on {os.uname().nodename} does not see {folders[-1] / 'checkpoint_info.json'}" in done["gone"]["note"]
    assert [done[name]["status"] for name in ("bad", "hopeless", "gone")] == ["failed"] * 3
    assert not list(results.glob(".shared*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_runs_and_lets_it_clean_up(address, make_candidate, tmp_path, number, code):
    folder, results = make_candidate("slow", behaviour="wait"), tmp_path / "results"
    process = evaluate_on(address, [folder], results, tmp_path / "log")
    wait_for(results / "slow" / "waiting")
    os.kill(process, number)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code, (tmp_path / "log").read_text()
    assert (results / "slow" / "cleaned").exists()
    assert not is_alive(int((results / "slow" / "attempts").read_text()))


def test_the_script_builds_a_list_on_a_cluster(address, base_dir, layers_dir, checkpoint_dir, quick_workers, tmp_path):
    (tmp_path / "list.csv").write_text("layers,description,name\n99,,\n2,,other\n1 3,a tiny pair,pair\n")
    shutil.copytree(checkpoint_dir, tmp_path / "out" / "other")
    command = ["bash", PACKAGE / "create_best_checkpoints.sh", "--list", "list.csv", "--output_root", "out"]
    result = subprocess.run(
        [*command, "--base", base_dir, "--llama_layers_dir", layers_dir, "--device", "cpu", "--ray", address],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert_refused(result, "Layer 99 is out of range", "layers: was 1 3, is now 2", "2 of 3 checkpoints failed")
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[-3:]}
    assert "failed" in rows["llamba_replaced_99"]
    assert "differs: layers: was 1 3, is now 2" in rows["other"]
    assert " built " in rows["pair"]
    for name in ("model.pt", "model_state_dict.pt", "tensor_digests.json"):
        assert (tmp_path / "out" / "pair" / name).read_bytes() == (checkpoint_dir / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pair", "other"}


def test_the_real_evaluator_goes_on_after_its_worker_is_killed(address, checkpoint_dir, quick_workers, tmp_path):
    checkpoint = shutil.copytree(checkpoint_dir, tmp_path / "pair")
    rng = random.Random(0)
    rows = {
        subject: {split: [question(rng) for _ in range(3)] for split in ("dev", "test")} for subject in MMLU_SUBJECTS
    }
    questions = write_questions(tmp_path / "mmlu", rows)

    def answered(folder: Path) -> int:
        return len(list(folder.glob("pair/*/answers/*.json")))

    cut, log = tmp_path / "cut", tmp_path / "log"
    flags = ["--mmlu_data", questions, "--device", "cpu", "--ray", address]
    process = start_command("evaluate_checkpoints", checkpoint, "--results_dir", cut, *flags, log=log)
    wait_until(lambda: answered(cut) >= 3, alive=process.is_alive)  # some subjects are done, most are not
    for worker in workers_running("test_checkpoint.py"):
        os.kill(worker, signal.SIGKILL)
    process.join(HANG_SECONDS)
    printed = log.read_text()
    assert process.exitcode == 0, printed
    assert "was lost" in printed
    whole = evaluate_checkpoint(checkpoint, mmlu_data=questions, results_dir=tmp_path / "whole")
    name, *layers_and_score = printed.strip().splitlines()[-1].split()[:7]
    assert name == "pair"
    assert layers_and_score == f"1 3 {whole['score']:.4f} ± {whole['stderr']:.4f} {whole['questions']}".split()


def test_a_killed_worker_of_a_search_is_replaced_and_the_result_is_that_of_one_process(
    address, base_dir, layers_dir, quick_workers, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(report, "PLOTS", {})
    task = write_task(tmp_path / "task", "tiny_words", make_questions(24))
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--task", task, "--device", "cpu"]
    flags += ["--method", "exhaustive", "--batch_size", 2]
    alone = run_command("search_layers", *flags, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    log, journal = tmp_path / "log", tmp_path / "ray" / "journal.jsonl"
    process = start_command("search_layers", *flags, "--output_dir", tmp_path / "ray", "--ray", address, log=log)
    kill_a_shard(process)  # before it has sent a score
    wait_until(lambda: journal.exists() and lines_of(journal) >= 3, alive=process.is_alive)  # the base, and two sets
    kill_a_shard(process)
    told = lines_of(journal)
    process.join(HANG_SECONDS)
    assert process.exitcode == 0, log.read_text()
    assert log.read_text().count("A worker was lost") in (1, 2)  # the second may have sent all its scores before
    assert told < 16 == lines_of(journal)
    found, wanted = (json.loads((tmp_path / name / "search_result.json").read_text()) for name in ("ray", "alone"))
    for name in ("final_results", "base_score", "base_stderr", "pareto", "failed"):
        assert found[name] == wanted[name]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    made = [(tuple(line["layers"]), part) for line in lines for part in line["parts"]]
    assert len(made) == len(set(made))


def test_a_gpu_that_torch_cannot_use_is_told_and_nothing_runs_on_the_cpu(
    address, base_dir, layers_dir, quick_workers, tmp_path
):
    task = write_task(tmp_path / "task", "tiny_words", make_questions(4))
    flags = ["--base", base_dir, "--llama_layers_dir", layers_dir, "--task", task, "--method", "singles"]
    result = run_command("search_layers", *flags, "--output_dir", tmp_path / "out", "--ray", address)
    assert "Device       a GPU from Ray for each job\n" in result.stdout, result.stderr
    assert_refused(result, "A worker of the search failed: --device cuda cannot be used here: ")
    assert lines_of(tmp_path / "out" / "journal.jsonl") == 0


def kill_a_shard(process: BaseProcess) -> None:
    """Kill a worker of the search that `process` runs, as soon as there is one."""
    workers: list[psutil.Process] = []

    def are_there() -> bool:
        workers[:] = [each for each in psutil.process_iter() if is_shard(each)]
        return bool(workers)

    wait_until(are_there, alive=process.is_alive)
    workers[0].kill()


def is_shard(process: psutil.Process) -> bool:
    """Whether this is a worker of our cluster: its open log is in the cluster's folder."""
    try:
        ours = process.name().startswith("ray::QuestionSh")
        return ours and any(file.path.startswith(os.environ["RAY_TMPDIR"]) for file in process.open_files())
    except psutil.Error:
        return False


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def workers_running(script: str) -> list[int]:
    """The ids of Ray's workers that run `script` in a child. Runs of other tests do not count."""
    parents = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                script.encode() in (folder / "cmdline").read_bytes()
                and b"--result_json" in (folder / "cmdline").read_bytes()
            ):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if (folder.with_name(parent) / "cmdline").read_bytes().startswith(b"ray::"):
                    parents.append(int(parent))
    return parents
