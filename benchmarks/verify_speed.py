"""Verifying a checkpoint, against reading the same files with dd, one after the other.

Prints the medians over --runs of seconds and GB/s, the ratio of both speeds, and the largest peak of resident
memory. Before every run, the files are dropped from the page cache. Each run is a separate process, and its time
includes imports. create_replaced_model_checkpoint.py makes a checkpoint to verify.

    python benchmarks/verify_speed.py --folder /mnt/scratch --checkpoint /mnt/scratch/out
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from measuring import PACKAGE, files_in, forget, peak_gb

COMMAND = PACKAGE / "verify_checkpoint.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files_only", action="store_true", help="also measure verify --files_only")
    args = parser.parse_args()
    if os.stat(args.folder).st_dev != os.stat(args.checkpoint).st_dev:
        sys.exit(f"{args.checkpoint} is not on the disk of {args.folder}.")
    paths = files_in(args.checkpoint)
    size_bytes = sum(path.stat().st_size for path in paths)

    commands = {"verify": [[sys.executable, COMMAND, args.checkpoint]]}
    if args.files_only:
        commands["verify --files_only"] = [[sys.executable, COMMAND, args.checkpoint, "--files_only"]]
    for name, flags in {"dd": [], "dd, direct": ["iflag=direct"]}.items():
        commands[name] = [["dd", f"if={path}", "of=/dev/null", "bs=4M", *flags] for path in paths]
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for run in range(args.runs):
        for name, arguments in commands.items():
            forget(paths)
            results[name].append(timed(arguments))
        print(f"run {run + 1}: {', '.join(f'{name} {v[-1][0]:.1f} s' for name, v in results.items())}", flush=True)

    seconds = {name: statistics.median(taken for taken, _ in measured) for name, measured in results.items()}
    fastest = min(seconds["dd"], seconds["dd, direct"])
    print(f"\n{size_bytes / 1e9:.2f} GB in {len(paths)} files, medians of {args.runs}")
    for name, taken in seconds.items():
        peak = max(peak for _, peak in results[name])
        speed = f"{size_bytes / taken / 1e9:6.2f} GB/s, {fastest / taken:.2f} of the disk's"
        print(f"{name:<20} {taken:7.1f} s   {speed}   {peak:5.2f} GB resident")


def timed(commands: list[list]) -> tuple[float, float]:
    """Run the commands one after the other. Return (seconds, the largest peak of resident memory in GB)."""
    started = time.perf_counter()
    peak = max(map(peak_gb, commands))
    return time.perf_counter() - started, peak


if __name__ == "__main__":
    main()
