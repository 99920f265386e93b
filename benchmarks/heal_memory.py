"""Peak memory of a healing step: whole sequences against segments, and a teacher in memory against a teacher's cache.

    python benchmarks/heal_memory.py --base tiny_llamba --donor tiny_llama --layers 4 10 --length 4096 --segment 512

Each run is a separate process with one step. Every figure includes loading and saving. The run "none" trains on only 8
tokens of the text. Its figure is the memory of the model, its gradients and its optimizer.
"""

import argparse
import tempfile
from pathlib import Path

from measuring import PACKAGE, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny_llamba", metavar="NAME|DIR")
    parser.add_argument("--donor", default="tiny_llama", metavar="NAME|DIR")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 10], metavar="N")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of a sequence (%(default)s)")
    parser.add_argument("--segment", type=int, default=512, metavar="N", help="tokens of a segment (%(default)s)")
    parser.add_argument("--method", default="full", metavar="NAME", help="of healing (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="heal-memory-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text("Mia likes quinces , and Rosa likes eggs . " * (args.length // 8))
        make = ["extract_layers.py", "--model_name", args.donor, "--output_dir", folder / "layers"]
        run([*make, "--layers", *args.layers])
        make = ["create_replaced_model_checkpoint.py", "--base", args.base, "--llama_layers_dir", folder / "layers"]
        run([*make, "--layers", *args.layers, "--output_dir", folder / "checkpoint"])
        heal = ["heal_checkpoint.py", "--checkpoint", folder / "checkpoint", "--data", text, "--device", "cpu"]
        heal += ["--max_steps", 1, "--eval_interval", 0, "--batch_size", 1, "--method", args.method]
        whole, short = ["--block_size", args.length], ["--block_size", args.segment]
        teacher, cache = ["--teacher", args.donor], ["--teacher_cache", folder / "cache"]
        found = {}
        for number, (name, more) in enumerate(
            {
                "none": ["--block_size", 8],
                "whole": whole,
                "segments": [*whole, "--segment_length", args.segment],
                "teacher in memory": [*short, *teacher],
                "teacher's cache is made": [*short, *teacher, *cache],
                "teacher on the disk": [*short, *cache],
            }.items()
        ):
            found[name] = run([*heal, *more, "--output_dir", folder / str(number)])
            print(f"{name:24} {1000 * found[name]:8.0f} MB", flush=True)
    above = [found[name] - found["none"] for name in ("whole", "segments")]
    print(f'Segments take 1 / {above[0] / above[1]:.1f} of the memory of whole sequences, above the run "none".')
    saved = found["teacher in memory"] - found["teacher on the disk"]
    print(f"Without the teacher in memory: {1000 * saved:.0f} MB less, {saved / found['teacher in memory']:.0%}.")


def run(arguments: list) -> float:
    """Run a command of the package. Return its peak resident memory in GB."""
    return timed([PACKAGE / arguments[0], *arguments[1:]])[1]


if __name__ == "__main__":
    main()
