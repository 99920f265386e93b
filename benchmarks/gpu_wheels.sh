#!/usr/bin/env bash
# Collects in .whl/ the packages that gpu.py needs on a GPU machine without a network (Python 3.12 on x86-64 Linux). The
# GPU machine must already have torch, transformers, accelerate, peft, pyarrow, pandas and pytest. benchmarks/README.md
# has the command that installs .whl/ there. An argument names MMLU's folder, which is copied to .whl/mmlu.
set -euo pipefail
mmlu=${1:+$(realpath -- "$1")}
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

versioned=(blake3 zlib-ng multidict multiprocess xxhash yarl)
pure=(lm_eval datasets dill evaluate fla-core flash-linear-attention more_itertools mbstrdecoder nltk
    pathvalidate pytablewriter DataProperty rouge_score sqlitedict tabledata tcolorpy typepy chardet word2number)

rm -rf .whl
platforms=()
for glibc in 2_39 2_34 2_28 2_27 2_24 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --dest .whl "${versioned[@]}"
"$python" -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir .whl "${pure[@]}"
if [ $# -gt 0 ]; then cp -r -- "$mmlu" .whl/mmlu; fi
git describe --always --dirty >.whl/commit
du -sh .whl
