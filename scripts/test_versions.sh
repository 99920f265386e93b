#!/usr/bin/env bash
# The tests of what other libraries' versions decide on (the model, the ways to load it, generating, lm-eval, healing an
# adapter, the hubs), with the oldest version of each that pyproject.toml allows; run_tests.sh runs everything with the
# newest. Those older versions go into .venv-oldest, made on the first run. Arguments go to pytest.
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
