"""Building a checkpoint against cp of the same bytes, and against loading, replacing and saving with torch.

Prints seconds, peak resident memory and ratios, medians over --runs. The base and the donor's layers hold random
numbers in bfloat16; all that is written is synced. What the disk can do is seen by dd, which writes as many zeros
directly, both files at once. With --cache warm, what each side reads was read just before, as far as memory holds it;
with cold, the page cache has let go of it.

    python benchmarks/build_speed.py --folder /mnt/scratch --shape 1b
"""

import argparse
import statistics
from pathlib import Path

from measuring import PACKAGE, files_in, forget, read_once, remove, timed, timed_copies, timed_raw
from random_models import IN_MEMORY, SHAPES, prepared

NAIVE = """
torch.save(grafted, out + "/model.pt")
torch.save(grafted.state_dict(), out + "/model_state_dict.pt")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work: the disk that is measured")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument(
        "--no_naive", action="store_true", help="leave out load-replace-save, which takes the most memory"
    )
    args = parser.parse_args()
    base, layers_dir, layers = prepared(args.shape, args.folder)
    sources = [*files_in(base), *files_in(layers_dir)]
    prepare = read_once if args.cache == "warm" else forget
    out, copy = args.folder / "out", args.folder / "copy"

    results: dict[str, list[tuple[float, float]]] = {"build": [], "cp": [], "dd": [], "load, replace, save": []}
    for run in range(args.runs):
        remove(out)
        command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base, "--llama_layers_dir", layers_dir]
        prepare(sources)
        results["build"].append(timed([*command, "--layers", *layers, "--output_dir", out]))
        written = [out / "model.pt", out / "model_state_dict.pt"]
        size_bytes = sum(path.stat().st_size for path in written)
        copy.mkdir(exist_ok=True)
        results["cp"].append((timed_copies(written, copy, warm=args.cache == "warm"), 0.0))
        remove(out)
        results["dd"].append((timed_raw([size_bytes // 2] * 2, copy), 0.0))
        if not args.no_naive:
            out.mkdir()
            prepare(sources)
            command = ["-c", IN_MEMORY + NAIVE, base, layers_dir, out, *layers]
            results["load, replace, save"].append(timed(command, sync=out))
        print(f"run {run + 1}: {', '.join(f'{name} {v[-1][0]:.1f} s' for name, v in results.items() if v)}", flush=True)
    remove(out)
    remove(copy)

    print(f"\n{args.shape}, {args.cache}: {size_bytes / 1e9:.2f} GB written, medians of {args.runs}")
    build_seconds = statistics.median(seconds for seconds, _ in results["build"])
    for name, measured in results.items():
        if measured:
            seconds = statistics.median(seconds for seconds, _ in measured)
            peak = max(peak for _, peak in measured)
            ratio = f"build / this = {build_seconds / seconds:.2f}"
            print(f"{name:<20} {seconds:7.1f} s   {peak:6.2f} GB resident   {ratio}")


if __name__ == "__main__":
    main()
