#!/usr/bin/env bash
# Build a checkpoint for every combination of a list: best_combinations.csv, or --list FILE. See --help.
# The interpreter is $PYTHON, else the repository's .venv, else python3.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/find_python.sh"
exec "$python" "$here/create_best_checkpoints.py" "$@"
