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
    if ! "$python" -c 'import torch' 2>/dev/null; then
        echo "error: there is no .venv, and $python has no torch. Run scripts/quickstart.sh, or name one: PYTHON=... $0" >&2
        exit 1
    fi
fi
exec "$python" "$here/create_best_checkpoints.py" "$@"
