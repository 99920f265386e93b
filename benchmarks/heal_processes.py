"""Whether the held-out loss of healing changes if the number of processes changes during the healing.

Healing with two processes is compared with healing with two, then one, then two processes. The change of the
loss is compared with the standard deviation over seeds of data order and dropout.

    python benchmarks/heal_processes.py --seeds 10
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=10, metavar="N", help="seeds, two runs for each (default: %(default)s)"
    )
    args = parser.parse_args()

    from model_preparation import build_checkpoint, extract_layers
    from model_preparation.train.heal import heal as _preloaded  # noqa: F401  (the runs are forked from here)
    from tests.conftest import make_base, make_donor
    from tests.train.cutting import run_until, write_text

    def after(output_dir: Path) -> tuple[float, int]:
        healing = json.loads((output_dir / "checkpoint_info.json").read_text())["healing"]
        return healing["scores"]["after"]["eval_loss"], healing["sequences_seen"]

    straight, changes = [], []
    with tempfile.TemporaryDirectory(prefix="heal-") as name:
        folder = Path(name)
        extract_layers(str(make_donor(folder / "donor")), folder / "layers")
        build_checkpoint(str(make_base(folder / "base")), [1, 3], folder / "layers", folder / "checkpoint")
        flags = ["--checkpoint", folder / "checkpoint", "--data", write_text(folder / "text.txt"), "--device", "cpu"]
        flags += ["--max_steps", STEPS, "--batch_size", 2, "--block_size", 32, "--accumulation", 2, "--dropout", 0.1]
        flags += ["--learning_rate", 3e-3, "--logging_steps", 1, "--save_steps", 1, "--eval_interval", STEPS]
        flags += ["--load_best", "no"]
        for seed in range(args.seeds):
            run = [*flags, "--seed", seed, "--output_dir"]
            run_until([*run, folder / f"straight_{seed}"], processes=2)
            changed = folder / f"changed_{seed}"
            run_until([*run, changed], STEPS // 3, processes=2)
            run_until([*run, changed], 2 * STEPS // 3)
            run_until([*run, changed], processes=2)
            (wanted, seen), (got, seen_too) = after(folder / f"straight_{seed}"), after(changed)
            straight.append(wanted)
            changes.append(got - wanted)
            print(f"seed {seed}: {wanted:.4f}, {seen} sequences; changed {got:.4f}, {seen_too}", flush=True)
    print(
        f"2 processes: {statistics.mean(straight):.4f}, standard deviation over seeds {statistics.stdev(straight):.4f}"
    )
    spread = statistics.stdev(changes)
    print(f"change by 2, 1, 2: {statistics.mean(changes):+.4f}, standard deviation over seeds {spread:.4f}")


if __name__ == "__main__":
    main()
