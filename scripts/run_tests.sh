#!/usr/bin/env bash
# Lint, format, types and tests, in a .venv made for them on the first run. Arguments go to pytest; --quick leaves out the
# slow tests (CONTRIBUTING.md).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

make_environment test
cd "$repository"
# Threads of several processes on few cores slow each other down tenfold.
export OMP_NUM_THREADS=1

"$python" -m ruff check
"$python" -m ruff format --check
# The types are checked beside the tests, and what is wrong with them is said last.
said=$(mktemp)
"$python" -m mypy &>"$said" & types=$!
trap 'kill $types 2>/dev/null || true; rm -f "$said"' EXIT
result=0
# Three at a time, each file's tests in order: many wait for a process of their own, or for the disk.
"$python" -m tests --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@" || result=$?
wait $types || result=$?
cat "$said"
exit $result
