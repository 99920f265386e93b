#!/usr/bin/env bash
# Build a checkpoint for every combination of a list: best_combinations.csv, or --list FILE. See --help.
# The interpreter is $PYTHON, else the repository's .venv, else python3.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv_python=$here/../.venv/bin/python
if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -x $venv_python ]]; then
    python=$venv_python
else
    python=python3
fi
exec "$python" "$here/create_best_checkpoints.py" "$@"
