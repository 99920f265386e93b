"""load_checkpoint against torch.load of model.pt, on the CPU, both with a cold page cache.

Prints medians over --runs: seconds of the call, seconds with imports, and the private memory that the call adds.
create_replaced_model_checkpoint.py makes a checkpoint to load.

    python benchmarks/load_speed.py --checkpoint /mnt/scratch/out
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import files_in, forget

CODE = """
import json, re, sys, time
import torch, transformers, model_preparation
from model_preparation import load_checkpoint
from model_preparation.llamba import LlambaForCausalLM
def private_gb():
    return sum(map(int, re.findall(r"Private_\\w+: +(\\d+)", open("/proc/self/smaps_rollup").read()))) * 1024 / 1e9
before, started = private_gb(), time.perf_counter()
CALL
print(json.dumps([time.perf_counter() - started, private_gb() - before]))
"""
CALLS = {
    "load_checkpoint": "model, tokenizer = load_checkpoint(sys.argv[1])",
    "torch.load": "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CALLS}
    for run in range(args.runs):
        for name, call in CALLS.items():
            forget(files_in(args.checkpoint))
            command = [sys.executable, "-c", CODE.replace("CALL", call), str(args.checkpoint)]
            started = time.perf_counter()
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append((*json.loads(printed), time.perf_counter() - started))
        print(f"run {run + 1}: {', '.join(f'{name} {v[-1][0]:.2f} s' for name, v in results.items())}", flush=True)

    print(f"\n{args.checkpoint.resolve().name}, medians of {args.runs}")
    medians = {name: [statistics.median(column) for column in zip(*v, strict=True)] for name, v in results.items()}
    for name, (seconds, private_gb, whole_seconds) in medians.items():
        ratio = f"{seconds / medians['torch.load'][0]:.3f} of torch.load"
        print(f"{name:<16} {seconds:7.2f} s ({whole_seconds:.2f} s with imports), {ratio}, {private_gb:.3f} GB private")


if __name__ == "__main__":
    main()
