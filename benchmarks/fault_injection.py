"""Injects a fault at each system call that changes the disk, and checks the folder afterwards.

Each command that writes a folder (extract, build, base, overwrite, clean: tests/faults/scenarios.py) is killed, or gets
the error of a full or broken disk, at each such call. Then the folder must be either the old folder or the new one, and
whole. Otherwise this is a violation, and the exit code is 1. Needs Linux on x86-64, a C compiler and the package's
extra "test".

    python benchmarks/fault_injection.py --faults 10000
    python benchmarks/fault_injection.py --only "build, overwrite" "killed after" 42
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10000, metavar="N", help="how many to inject (default: 10000)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the faults (default: 0)")
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="run only these scenarios")
    parser.add_argument("--only", nargs=3, metavar=("SCENARIO", "KIND", "CALL"), help="one fault, printed in full")
    args = parser.parse_args()

    from tests.faults.injector import Fault
    from tests.faults.scenarios import SCENARIOS
    from tests.faults.sweep import Sweep

    with tempfile.TemporaryDirectory(prefix="faults-", dir=args.folder) as folder:
        if args.only:
            name, kind, at = args.only
            with Sweep(Path(folder), {name: SCENARIOS[name]}) as sweep:
                print(sweep.inject(name, Fault(kind, int(at))))
            return
        with Sweep(Path(folder), {name: SCENARIOS[name] for name in args.scenarios or SCENARIOS}) as sweep:
            for name, place in sweep.places.items():
                print(f"{name}: {len(place.calls)} calls")
            sys.exit(1 if run(sweep, args.faults, args.seed) else 0)


def run(sweep, count: int, seed: int) -> int:
    """Inject `count` faults, print the table, and return the number of violations."""
    started = time.monotonic()
    rows: dict[tuple[str, str], Counter] = {}
    errors: Counter = Counter()
    injected = violations = 0
    for name, fault in sweep.faults(seed):
        if injected == count:
            break
        result = sweep.inject(name, fault)
        row = rows.setdefault((name, fault.kind), Counter())
        injected += result.call is not None
        row["injected"] += result.call is not None
        row[result.state] += 1
        row["violations"] += len(result.violations)
        errors[result.error] += 1
        for violation in result.violations:
            violations += 1
            print(f'VIOLATION: {violation}\n  {result.call}\n  --only "{name}" "{fault.kind}" {fault.at}', flush=True)
    print(f"\n{'scenario':42}{'fault':26}{'injected':>9}{'old':>7}{'new':>7}{'aside':>7}{'violations':>12}")
    for (name, kind), row in sorted(rows.items()):
        figures = f"{row['injected']:9}{row['old']:7}{row['new']:7}{row['aside']:7}{row['violations']:12}"
        print(f"{name:42}{kind:26}{figures}")
    print("errors that the runs ended with:", ", ".join(f"{name or 'none'} {n}" for name, n in errors.most_common()))
    seconds = time.monotonic() - started
    print(f"{injected} faults, {violations} violations, {seconds:.0f} s ({1000 * seconds / injected:.0f} ms each)")
    return violations


if __name__ == "__main__":
    main()
