#!/usr/bin/env bash
# Checks lint, format and types, and runs the tests. The first run makes the environment .venv. Arguments go to pytest;
# --quick leaves out the slow tests (CONTRIBUTING.md).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

make_environment test
cd "$repository"
# Threads of several processes on few cores slow each other down tenfold.
export OMP_NUM_THREADS=1

"$python" -m ruff check
"$python" -m ruff format --check
# mypy runs at the same time as the tests. Its output is printed at the end.
said=$(mktemp)
"$python" -m mypy &>"$said" & types=$!
trap 'kill $types 2>/dev/null || true; rm -f "$said"' EXIT
result=0
# Three workers also on two cores, because many tests wait for a process or the disk. A file's tests run in order.
"$python" -m tests --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@" || result=$?
wait $types || result=$?
cat "$said"
exit $result
