"""Extracting layers against copying the same bytes with cp, and against loading the model and torch.save of each layer.

Prints seconds, peak resident memory and ratios, medians over --runs. The model, a Llamba with random numbers in
bfloat16, was read just before, as far as memory holds it; all its layers are extracted.

    python benchmarks/extract_speed.py --folder /mnt/scratch --shape 1b
"""

import argparse
import statistics
from pathlib import Path

from measuring import PACKAGE, files_in, read_once, remove, timed, timed_copies
from random_models import SHAPES, prepared

NAIVE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
folder, out = sys.argv[1:]
model = {}
for path in sorted(Path(folder).glob("*.safetensors")):
    model |= load_file(path)
for layer in {name.split(".")[2] for name in model if name.startswith("backbone.layers.")}:
    prefix = f"backbone.layers.{layer}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in model.items() if name.startswith(prefix)}
    torch.save(tensors, f"{out}/layer_{layer}.pt")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work: the disk that is measured")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no_naive", action="store_true", help="leave out the way that loads the whole model")
    args = parser.parse_args()
    model, _, _ = prepared(args.shape, args.folder)
    out, copy = args.folder / "out", args.folder / "copy"

    results: dict[str, list[tuple[float, float]]] = {"extract": [], "cp": [], "load, torch.save": []}
    for run in range(args.runs):
        remove(out)
        read_once(files_in(model))
        results["extract"].append(timed([PACKAGE / "extract_layers.py", "--model_name", model, "--output_dir", out]))
        written = sorted(out.glob("layer_*.pt"))
        size_bytes = sum(path.stat().st_size for path in written)
        copy.mkdir(exist_ok=True)
        results["cp"].append((timed_copies(written, copy, warm=True), 0.0))
        if not args.no_naive:
            remove(out)
            out.mkdir()
            read_once(files_in(model))
            results["load, torch.save"].append(timed(["-c", NAIVE, model, out], sync=out))
        print(f"run {run + 1}: {', '.join(f'{name} {v[-1][0]:.1f} s' for name, v in results.items() if v)}", flush=True)
    remove(out)
    remove(copy)

    print(f"\n{args.shape}: {len(written)} layers, {size_bytes / 1e9:.2f} GB, medians of {args.runs}")
    extract_seconds = statistics.median(seconds for seconds, _ in results["extract"])
    for name, measured in results.items():
        if not measured:
            continue
        seconds = statistics.median(seconds for seconds, _ in measured)
        peak = max(peak for _, peak in measured)
        ratio = f"extract / this = {extract_seconds / seconds:.2f}"
        print(f"{name:<20} {seconds:7.1f} s   {peak:6.2f} GB resident   {ratio}")


if __name__ == "__main__":
    main()
