"""Building a graft in --format hf, against loading the base, replacing layers, and save_pretrained.

Another checkpoint of the same base is built first, in the same folder. This first build fills the store with the base's
shards, and is timed once. Prints seconds, bytes written, peak resident memory and ratios, medians over --runs. The
models are those of build_speed.py. Each run is a separate process, its time includes imports, and all written files are
synced.

    python benchmarks/hf_format_speed.py --folder /mnt/scratch --shape 1b
"""

import argparse
import resource
import shutil
import statistics
from pathlib import Path

from measuring import PACKAGE, timed
from random_models import IN_MEMORY, SHAPES, prepared

NAIVE = """
from transformers import AutoTokenizer
grafted.save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work, on the disk to measure")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no_naive", action="store_true", help="leave out save_pretrained, which takes memory")
    args = parser.parse_args()
    base, layers_dir, layers = prepared(args.shape, args.folder)
    checkpoints = args.folder / "hf_checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base, "--llama_layers_dir", layers_dir]
    command += ["--format", "hf", "--layers", *layers, "--output_dir"]

    before = written_gb()
    seconds, peak = timed([*command, checkpoints / "first"])
    first = f"{seconds:.1f} s, {written_gb() - before:.2f} GB written, {peak:.2f} GB resident"
    print(f"first build, which fills the store: {first}", flush=True)
    results: dict[str, list[tuple[float, float, float]]] = {"build": [], "load, replace, save": []}
    for run in range(args.runs):
        for name, found in results.items():
            if name != "build" and args.no_naive:
                continue
            out = checkpoints / "second"
            before = written_gb()
            if name == "build":
                seconds, peak = timed([*command, out])
            else:
                out.mkdir()
                seconds, peak = timed(["-c", IN_MEMORY + NAIVE, base, layers_dir, out, *layers], sync=out)
            found.append((seconds, written_gb() - before, peak))
            shutil.rmtree(out)
        print(f"run {run + 1}: {', '.join(f'{name} {v[-1][0]:.1f} s' for name, v in results.items() if v)}", flush=True)
    shutil.rmtree(checkpoints)

    print(f"\n{args.shape}: layers {' '.join(layers)} grafted, medians of {args.runs}")
    build_seconds = statistics.median(seconds for seconds, _, _ in results["build"])
    for name, found in results.items():
        if found:
            seconds, written, peak = (statistics.median(column) for column in zip(*found, strict=True))
            ratio = f"build / this = {build_seconds / seconds:.2f}"
            print(f"{name:<20} {seconds:7.1f} s   {written:6.2f} GB written   {peak:6.2f} GB resident   {ratio}")


def written_gb() -> float:
    """GB that all ended child processes have written to disks, as Linux counts them."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock * 512 / 1e9


if __name__ == "__main__":
    main()
