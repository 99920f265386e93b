#!/usr/bin/env bash
# Lint, format, types and tests, in a .venv made for them on the first run. Arguments go to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

make_environment test
cd "$repository"
# Threads of several processes on few cores slow each other down tenfold.
export OMP_NUM_THREADS=1

"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
# Two at a time, each file's tests in order: most of them wait for a process of their own.
"$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
