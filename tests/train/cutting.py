"""Healing runs that are killed while they train, for the tests and for benchmarks/heal_resume.py.

In: the command's arguments and where to cut. Out: what is on the disk when the run has gone on to its end.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from model_preparation.train.heal import result
from model_preparation.train.heal.resume_state import list_states
from tests.conftest import PACKAGE, _become_command, run_command

_TEXT = "the cat sat on a mat and a dog ran far away from home in the rain while birds sang of better days"


def write_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """A text of common words in an order drawn from the seed."""
    path.write_text(" ".join(random.Random(seed).choices(_TEXT.split(), k=words)))
    return path


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """Runs that are forked in this context write few tokens and draw no plot. This halves their time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(result, "_NEW_TOKENS", 3)
        patched.setattr(result, "_plot_losses", lambda log, path: path.touch())
        yield


def run_heal(*args: object, cwd: Path = PACKAGE) -> subprocess.CompletedProcess:
    """Run heal_checkpoint to its end, in a `brief` way."""
    with brief():
        return run_command("heal_checkpoint", *args, cwd=cwd)


def run_until(
    args: list[object],
    step: int | None = None,
    delay: float = 0.0,
    number: int = signal.SIGKILL,
    *,
    processes: int | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run heal_checkpoint and signal it `delay` seconds after it logged `step`; (exit code, standard output).

    `args` must have `--logging_steps 1`. The run is `brief`, and forked from this process. With `processes`,
    each process gets the environment that torchrun gives. All get the signal. The code is the first one's.
    """
    reading, writing = os.pipe()
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if processes else {}
    env = {**master, **(env or {})}
    children = []
    for rank in range(processes or 1):
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if processes:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            with brief():
                _become_command("heal_checkpoint", tuple(args), PACKAGE, env)
        children.append(child)
    os.close(writing)
    text = ""
    with os.fdopen(reading) as lines:
        for line in lines:
            text += line
            if step is not None and line.startswith("step") and int(line.split()[1]) >= step:
                time.sleep(delay)
                for child in children:
                    os.kill(child, number)
                step = None
        statuses = [os.waitpid(child, 0)[1] for child in children]
    return os.waitstatus_to_exitcode(statuses[0]), text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcome(output_dir: Path, stage: str | None = None) -> dict[str, object]:
    """What two runs must share, to the bit: weights, training state, loss log, scores, texts, last step."""
    states = output_dir.with_name(f"{output_dir.name}_resume")
    newest = list_states(states if stage is None else states / f"{stage}_resume")[0][-1]
    kinds = (".pt", ".pth", ".distcp")
    files = {name: entry["sha256"] for name, entry in newest.info["files"].items() if name.endswith(kinds)}
    weights = torch.load(output_dir / "model_state_dict.pt")
    info = json.loads((output_dir / "checkpoint_info.json").read_text())
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "state": files,
        "log": (output_dir / "training_log.jsonl").read_text(),
        "scores": info["healing"]["scores"],
        "texts": info["healing"]["texts"],
        "step": newest.steps,
    }
