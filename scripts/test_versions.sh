#!/usr/bin/env bash
# Runs the tests that depend on the versions of other libraries (the model, the ways to load it, generating, lm-eval,
# healing an adapter, the hubs), with the oldest version of each library that pyproject.toml allows. The first run makes
# an environment with these versions, .venv-oldest. run_tests.sh runs all tests with the newest. Arguments go to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

make_environment test
oldest=$repository/.venv-oldest
if ! inputs oldest | cmp --silent - "$oldest/installed"; then
    started=$SECONDS
    echo "== Installing into .venv-oldest: the oldest version of each library (a minute the first time)"
    "$python" "$repository/scripts/oldest_environment.py" "$oldest"
    inputs oldest > "$oldest/installed"
    echo "   $((SECONDS - started)) s"
fi
cd "$repository"
export OMP_NUM_THREADS=1 OTHER_PYTHON=$python
"$oldest/bin/python" -m pytest --numprocesses 2 --dist loadfile \
    tests/{llamba,test_hf_format.py,test_loading.py,test_versions.py,checkpoint/test_sources.py,train/test_adapters.py} "$@"
