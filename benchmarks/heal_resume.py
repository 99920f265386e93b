"""Kills healing runs at random moments, continues each to its end, and compares it with a run without interruption.

Weights, training state, loss log, scores, texts and the last step must be the same to the bit. The runs use shuffled
data, dropout and gradient accumulation. The exit code is 1 if anything differs in any run.

    python benchmarks/heal_resume.py --kills 50
    python benchmarks/heal_resume.py --kills 50 --method lora
"""

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of kills (default: %(default)s)")
    parser.add_argument("--method", default="full", help="as for heal_checkpoint.py (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    args = parser.parse_args()

    from model_preparation import build_checkpoint, extract_layers
    from model_preparation.train.heal import heal as _preloaded  # noqa: F401  (the runs are forked from here)
    from tests.conftest import make_base, make_donor
    from tests.train.cutting import outcome, run_heal, run_until, write_text

    moments = random.Random(args.seed)
    kills: Counter[int] = Counter()
    runs = differing = 0
    with tempfile.TemporaryDirectory(prefix="heal-") as name:
        folder = Path(name)
        extract_layers(str(make_donor(folder / "donor")), folder / "layers")
        build_checkpoint(str(make_base(folder / "base")), [1, 3], folder / "layers", folder / "checkpoint")
        flags = ["--checkpoint", folder / "checkpoint", "--data", write_text(folder / "text.txt"), "--device", "cpu"]
        flags += ["--method", args.method, "--max_steps", STEPS, "--block_size", 32, "--accumulation", 2]
        flags += ["--lora_dropout", 0.1] if args.method == "lora" else []
        flags += ["--dropout", 0.1, "--learning_rate", 1e-3, "--logging_steps", 1]
        flags += ["--save_steps", 2, "--eval_interval", 5, "--overwrite"]
        straight = run_heal(*flags, "--output_dir", folder / "straight")
        if straight.returncode:
            sys.exit(straight.stderr)
        wanted = outcome(folder / "straight")
        while kills.total() < args.kills:
            output_dir = folder / f"cut_{runs}"
            runs += 1
            step = 0
            while (step := moments.randint(step, STEPS + 2)) < STEPS and kills.total() < args.kills:
                code = run_until([*flags, "--output_dir", output_dir], step, moments.random() * 0.1)[0]
                kills[step] += code == -signal.SIGKILL
            ended = run_heal(*flags, "--output_dir", output_dir)
            same = ended.returncode == 0 and outcome(output_dir) == wanted
            differing += not same
            print(f"run {runs}: {kills.total()} kills so far, {'same bits' if same else 'DIFFERENT'}", flush=True)
    print(f"{kills.total()} kills in {runs} runs, after steps {dict(sorted(kills.items()))}: {differing} runs differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
