"""Checkpoints of the embedded pair, and servers of them."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from model_preparation import build_checkpoint, evaluate_checkpoint, extract_layers
from tests.conftest import PACKAGE, run_command, wait_until

GRAFTED = [3, 7]


@pytest.fixture(scope="session")
def served_dirs(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the embedded pair by their format, the same layers grafted. Change nothing in them."""
    folder = tmp_path_factory.mktemp("served")
    extract_layers("tiny_llama", folder / "layers")
    for form in ("pt", "hf"):
        build_checkpoint("tiny_llamba", GRAFTED, folder / "layers", folder / f"graft_{form}", format=form)
    return {form: folder / f"graft_{form}" for form in ("pt", "hf")}


class Server(NamedTuple):
    url: str
    name: str
    said: Path  # what the command printed
    process: subprocess.Popen

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)


SCORED = {"tasks": ("embedded_recall", "embedded_recall_generated"), "lengths": (64,), "limit": 12}


def assert_scores_are_ours(checkpoint: Path, server: Server, results_dir: Path, **env: str) -> Path:
    """Check that the server and `evaluate_checkpoint` give the same answers to both kinds of task.

    Return the folder of the server's results.
    """
    flags = ("--checkpoint", checkpoint, "--tasks", *SCORED["tasks"], "--results_dir", results_dir)
    flags += ("--limit", SCORED["limit"], "--lengths", *SCORED["lengths"])
    asked = run_command("test_checkpoint", *flags, "--server", server.url, "--model", server.name, **env)
    assert asked.returncode == 0, asked.stderr
    ours = evaluate_checkpoint(checkpoint, **SCORED, results_dir=results_dir.parent / "ours")
    folders = [Path(asked.stdout.rpartition("Results are in ")[2].strip()), Path(ours["results_dir"])]

    def answers(name: str) -> list[list]:
        return [json.loads((folder / "answers" / f"{name}.json").read_text())["answers"] for folder in folders]

    chosen = answers("loglikelihood.embedded_recall_64")
    assert [greedy for _, greedy in chosen[0]] == [greedy for _, greedy in chosen[1]]
    for (served, _), (own, _) in zip(*chosen, strict=True):
        assert served == pytest.approx(own, abs=1e-4)
    served_texts, own_texts = answers("generate_until.embedded_recall_generated_64")
    # vLLM decodes the answer together with the prompt, so the space between them stays.
    assert [text.strip() for text in served_texts] == [text.strip() for text in own_texts]
    assert any(own_texts)
    return folders[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def serve(tmp_path_factory) -> Iterator[Callable[..., Server]]:
    """Starts serve_checkpoint.py, and waits until it says that it is ready. Ends it after the tests."""
    started = []

    def start(checkpoint: Path, *flags: object) -> Server:
        said, port = tmp_path_factory.mktemp("server") / "said.txt", free_port()
        command = [str(PACKAGE / "serve_checkpoint.py"), "--checkpoint", str(checkpoint), "--port", str(port)]
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, *map(str, flags)], stdout=output, stderr=subprocess.STDOUT
            )
        started.append(process)
        wait_until(lambda: "Ready." in said.read_text(), alive=lambda: process.poll() is None)
        return Server(f"http://127.0.0.1:{port}", checkpoint.name, said, process)

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
