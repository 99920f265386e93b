"""Healing runs that are killed while they train, for the tests and for benchmarks/heal_resume.py.

In: the command's arguments and where to cut. Out: what is on the disk when the run has gone on to its end.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import torch

from model_preparation.training.resume_state import list_states
from tests.conftest import PACKAGE, _become_command

_WORDS = "the cat sat on a mat and a dog ran far away from home in the rain while birds sang of better days".split()


def write_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """A text of common words in an order drawn from the seed."""
    path.write_text(" ".join(random.Random(seed).choices(_WORDS, k=words)))
    return path


def run_until(args: list[object], step: int, delay: float, number: int = signal.SIGKILL) -> int:
    """Run heal_checkpoint and send it a signal `delay` seconds after it logged `step`; returns its exit code, as subprocess.

    It has to be asked for `--logging_steps 1`. It is forked from this process, so that nothing is imported anew.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _become_command("heal_checkpoint", tuple(args), PACKAGE, {})
    os.close(writing)
    with os.fdopen(reading) as lines:
        for line in lines:
            if line.startswith("step") and int(line.split()[1]) >= step:
                time.sleep(delay)
                os.kill(child, number)
                break
        lines.read()
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def outcome(output_dir: Path) -> dict[str, object]:
    """What two runs have to have in common, bit by bit: weights, optimizer, scheduler, random states, loss log."""
    newest = list_states(output_dir.with_name(f"{output_dir.name}_resume"))[0][-1]
    files = {name: entry["sha256"] for name, entry in newest.info["files"].items() if name.endswith((".pt", ".pth"))}
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
