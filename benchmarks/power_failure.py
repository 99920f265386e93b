"""Simulates power cuts at any moment of a run, and checks what is on the disk afterwards.

The script records every change that these runs make on the disk: extract, build, overwrite, a base, cleaning
(tests/faults/scenarios.py); healing, evaluating, a search's journal (tests/faults/long_work.py). From these changes it
makes states of the disk that ext4, XFS and the weakest file system that POSIX allows may leave (tests/faults/disk.py
says what each may lose). In every state, a folder must be either the old folder or the new one, and whole.
Where two folders cannot be swapped, the old one may also be inside NAME.partial (in the table: aside).
Everything that was printed as done must be there. In some states, the same command runs again, and must end as
if nothing had happened. Anything else is a violation; the exit code is 1. Needs Linux on x86-64, a C compiler
and the package's extra "test".

    python benchmarks/power_failure.py --states 10000
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=10000, metavar="N", help="states to check (default: 10000)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument(
        "--again",
        type=float,
        default=0.15,
        metavar="PART",
        help="share of new kinds of states after which the command runs again (default: 0.15)",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these scenarios")
    args = parser.parse_args()

    from tests.faults.long_work import WORKS
    from tests.faults.power import PowerSweep
    from tests.faults.scenarios import SCENARIOS

    names = args.only or [*SCENARIOS, *WORKS]
    if unknown := [name for name in names if name not in SCENARIOS.keys() | WORKS.keys()]:
        parser.error(f"{unknown[0]} is none of {', '.join([*SCENARIOS, *WORKS])}")
    scenarios = {name: SCENARIOS[name] for name in names if name in SCENARIOS}
    works = {name: WORKS[name] for name in names if name in WORKS}
    with (
        tempfile.TemporaryDirectory(prefix="power-", dir=args.folder) as folder,
        PowerSweep(Path(folder), scenarios, works, args.again) as sweep,
    ):
        sys.exit(1 if run(sweep, args.states, args.seed) else 0)


def run(sweep, count: int, seed: int) -> int:
    """Check `count` states, print the table, and return the number of violations."""
    started = time.monotonic()
    rows: dict[tuple[str, str], Counter] = {}
    for number, result in enumerate(islice(sweep.results(seed), count), start=1):
        row = rows.setdefault((result.scenario, result.system), Counter())
        row.update(["states", result.found, *(["again"] if result.again else [])])
        row["violations"] += len(result.violations)
        for violation in result.violations:
            cut = result.cut
            print(f"VIOLATION: {violation}\n  {result.scenario}, {result.system}, {cut}", flush=True)
        if number % 1000 == 0:
            print(f"{number} states after {time.monotonic() - started:.0f} s", flush=True)
    columns = ("states", "old", "new", "aside", "again", "violations")
    print(f"\n{'scenario':42}{'file system':12}" + "".join(f"{column:>11}" for column in columns))
    for (name, system), row in sorted(rows.items()):
        print(f"{name:42}{system:12}" + "".join(f"{row[column]:11}" for column in columns))
    totals = sum(rows.values(), Counter())
    seconds = time.monotonic() - started
    calls = sum(place.disk.calls for place in sweep.cut_places.values())
    print(
        f"{totals['states']} states from {calls} calls of {len(sweep.cut_places)} scenarios; the same command again "
        f"after {totals['again']}; {totals['violations']} violations; {seconds:.0f} s"
    )
    return totals["violations"]


if __name__ == "__main__":
    main()
