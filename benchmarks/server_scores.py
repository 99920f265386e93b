"""Scores a checkpoint on MMLU through `layer-surgery serve` and in this process, with --limit questions per subject.

Prints how many choices are the same, the largest difference of a log-probability, the seconds of both sides and their
ratio. The server is vLLM if vLLM is installed and can serve the checkpoint. Starting the server is not
counted.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from model_preparation import evaluate_checkpoint

SERVE = Path(__file__).resolve().parents[1] / "model_preparation" / "serve_checkpoint.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--mmlu_data", required=True, help="as test_checkpoint.py takes it")
    parser.add_argument("--limit", type=int, default=1, help="questions per subject")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here, seconds_here = score(args, Path(folder) / "here")
        with server(args):
            served, seconds_served = score(args, Path(folder) / "served", server=f"http://127.0.0.1:{args.port}")
    same = sum(best(one) == best(other) for one, other in zip(here, served, strict=True))
    apart = max(abs(a - b) for one, other in zip(here, served, strict=True) for a, b in zip(one, other, strict=True))
    print(f"{same} of {len(here)} choices are the same; log-probabilities differ by {apart:.6f} at most")
    print(f"here {seconds_here:.0f} s, through the server {seconds_served:.0f} s: {seconds_served / seconds_here:.2f}")


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[None]:
    command = [sys.executable, str(SERVE), "--checkpoint", str(args.checkpoint), "--port", str(args.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not any(line.startswith("Ready.") for line in process.stdout):
                raise SystemExit("The server did not start.")
            yield
        finally:
            process.terminate()


def score(args: argparse.Namespace, results_dir: Path, **settings: str) -> tuple[list[list[float]], float]:
    """(The log-probabilities of the choices of each question, seconds.)"""
    started = time.perf_counter()
    settings = {"limit": args.limit, "mmlu_data": args.mmlu_data, "results_dir": results_dir, **settings}
    result = evaluate_checkpoint(args.checkpoint, **settings)
    seconds = time.perf_counter() - started
    return list(choices_in(Path(result["results_dir"]))), seconds


def choices_in(folder: Path) -> Iterator[list[float]]:
    for path in sorted(folder.glob("answers/loglikelihood.*.json")):
        values = [value for value, _ in json.loads(path.read_text())["answers"]]
        yield from (values[first : first + 4] for first in range(0, len(values), 4))


def best(values: list[float]) -> int:
    return values.index(max(values))


if __name__ == "__main__":
    main()
