#!/usr/bin/env bash
# Evaluate many checkpoints, and print one table. Give folders of checkpoints, or --list FILE; see --help.
# The interpreter is $PYTHON, else the repository's .venv, else python3.
set -euo pipefail

package=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../model_preparation" && pwd)
source "$package/find_python.sh"
exec "$python" "$package/evaluate_checkpoints.py" "$@"
