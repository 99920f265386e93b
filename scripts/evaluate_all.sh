#!/usr/bin/env bash
# Evaluate many checkpoints and print one table: folders of them, or --list FILE. See --help.
# The interpreter is $PYTHON, else the repository's .venv, else python3.
set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -x $repository/.venv/bin/python ]]; then
    python=$repository/.venv/bin/python
else
    python=python3
    if ! "$python" -c 'import torch' 2>/dev/null; then
        echo "error: there is no .venv, and $python has no torch. Run scripts/quickstart.sh, or name one: PYTHON=... $0" >&2
        exit 1
    fi
fi
exec "$python" "$repository/model_preparation/evaluate_checkpoints.py" "$@"
