"""How long building a checkpoint and extracting layers take, against cp and dd of as many bytes, and against torch.

Prints medians over --runs of seconds and ratios, and the highest peak of resident memory. Each ratio
compares figures of one run. Base and layers hold random numbers in bfloat16. All written files are synced.
The script extracts all layers of the base. dd shows the speed of the disk: it writes as many zeros past the
page cache, into two files at once, as a build does. A process that only imports shows how long the imports
take. With --cache warm, the files to read are in the page cache, as far as memory holds them. With cold, the
script first drops them from the page cache. The first run reads the base for its digests. Later runs take the
digests from the user's cache. Processor seconds count all threads. Other work on the machine hardly changes
them.

    python benchmarks/build_speed.py --folder /mnt/scratch --shape half
"""

import argparse
import resource
import statistics
from pathlib import Path

from measuring import PACKAGE, files_in, forget, read_once, remove, timed, timed_copies, timed_raw
from random_models import IN_MEMORY, SHAPES, prepared

IMPORTS = {
    "import torch": "import torch",
    "all imports": "import gc; gc.set_threshold(100_000)\nimport model_preparation.checkpoint.smoke_test",
}
BUILD_IN_MEMORY = """
torch.save(grafted, out + "/model.pt")
torch.save(grafted.state_dict(), out + "/model_state_dict.pt")
"""
EXTRACT_IN_MEMORY = """
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
# {name of a ratio: how to compute it from the seconds of one run}
RATIOS = {
    "build without imports / the faster of cp and dd (goal: 1.25, from 3 GB on)": lambda s: (
        (s["build"] - s["all imports"]) / min(s["cp"], s["dd"])
    ),
    "build / (1.25 x the faster of cp and dd + import torch) (goal: 1)": lambda s: (
        s["build"] / (1.25 * min(s["cp"], s["dd"]) + s["import torch"])
    ),
    "build / cp": lambda s: s["build"] / s["cp"],
    "build / dd": lambda s: s["build"] / s["dd"],
    "build / load, replace, save": lambda s: s["build"] / s["load, replace, save"],
    "extract / cp (goal: 2)": lambda s: s["extract"] / s["cp of layers"],
    "extract / load, save": lambda s: s["extract"] / s["load, save"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work, on the disk to measure")
    parser.add_argument("--shape", choices=SHAPES, default="half")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--no_naive", action="store_true", help="leave out the runs with whole models in memory")
    args = parser.parse_args()
    base, layers_dir, layers = prepared(args.shape, args.folder)
    prepare = read_once if args.cache == "warm" else forget
    out, copy = args.folder / "out", args.folder / "copy"
    copy.mkdir(exist_ok=True)
    runs: list[dict[str, float]] = []
    peaks: dict[str, float] = {}
    sizes: dict[str, float] = {}

    def measure(name: str, command: list, sources: list[Path], *, sync: bool = False) -> None:
        remove(out)
        if sync:
            out.mkdir()
        prepare(sources)
        before = processor_seconds()
        runs[-1][name], peak = timed(command, sync=out if sync else None)
        runs[-1][f"{name}, processor"] = processor_seconds() - before
        peaks[name] = max(peak, peaks.get(name, 0.0))

    def copied(name: str, pattern: str) -> list[int]:
        written = sorted(out.glob(pattern))
        sizes[name] = sum(path.stat().st_size for path in written) / 1e9
        runs[-1][f"cp{name}"] = timed_copies(written, copy, warm=args.cache == "warm")
        return [path.stat().st_size for path in written]

    build = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base, "--llama_layers_dir", layers_dir]
    extract = [PACKAGE / "extract_layers.py", "--model_name", base, "--output_dir", out]
    for number in range(args.runs):
        runs.append({name: timed(["-c", code])[0] for name, code in IMPORTS.items()})
        sources = [*files_in(base), *files_in(layers_dir)]
        measure("build", [*build, "--layers", *layers, "--output_dir", out], sources)
        written = copied("", "model*.pt")
        remove(out)
        runs[-1]["dd"] = timed_raw(written, copy)
        measure("extract", extract, files_in(base))
        copied(" of layers", "layer_*.pt")
        if not args.no_naive:
            command = ["-c", IN_MEMORY + BUILD_IN_MEMORY, base, layers_dir, out, *layers]
            measure("load, replace, save", command, sources, sync=True)
            measure("load, save", ["-c", EXTRACT_IN_MEMORY, base, out], files_in(base), sync=True)
        print(f"run {number + 1}: {', '.join(f'{name} {value:.1f} s' for name, value in runs[-1].items())}", flush=True)
    remove(out)
    remove(copy)

    print(f"\n{args.shape}, {args.cache}: built {sizes['']:.2f} GB, extracted {sizes[' of layers']:.2f} GB")
    print(f"medians of {args.runs}, and the highest peaks:")
    for name in runs[0]:
        peak = f"{peaks[name]:6.2f} GB resident" if name in peaks else ""
        print(f"  {name:<30} {statistics.median(run[name] for run in runs):7.1f} s {peak}")
    for name, ratio in RATIOS.items():
        if not args.no_naive or "save" not in name:
            values = [ratio(run) for run in runs]
            print(f"  {statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})  {name}")


def processor_seconds() -> float:
    """User and system time of all processes that this process started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
