#!/usr/bin/env bash
# The family sweep on the lowest transformers that pyproject.toml allows, in an environment of its own.
#
#   bash eval/lowest_transformers.sh -n 2 [more pytest options]     # about five minutes on two cores
set -euo pipefail
cd "$(dirname "$0")/.."
lowest=$(sed -n 's/^ *"transformers>=\([0-9.]*\)",$/\1/p' pyproject.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" HF_HOME="$work/hf" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
grep -v "^transformers==" constraints.txt > "$work/constraints.txt"
pip install --quiet -c "$work/constraints.txt" torch==2.13.0
pip install --quiet -c "$work/constraints.txt" ".[test]" "transformers==$lowest"
pip list 2>/dev/null | grep -iE "^(torch|transformers|tokenizers|huggingface|safetensors|accelerate) "
python -m pytest tests/moe/test_families.py tests/moe/families tests/moe/test_multimodal.py \
  tests/moe/test_quantised.py "$@"
