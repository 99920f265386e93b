# To be sourced. Sets `python` to $PYTHON, else to the repository's .venv, else to python3 if that has torch.
python=${PYTHON:-$(dirname -- "${BASH_SOURCE[0]}")/../.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
    python=python3
    if ! "$python" -c 'import torch' 2>/dev/null; then
        echo "error: there is no .venv, and $python has no torch. Run scripts/quickstart.sh, or name a Python that has torch: PYTHON=... $0" >&2
        exit 1
    fi
fi
