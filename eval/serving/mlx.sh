#!/usr/bin/env bash
# Unequal results of moe_fair in mlx-lm, against transformers, on a CPU.
#
#     bash eval/serving/mlx.sh [WORK] [FAMILY ...]
#
# Needs moe_fair's environment as `python`; makes one of its own for mlx-lm in WORK/venv. Ends with a
# table; WORK/mlx.jsonl has the rows, which `python eval/serving/runs.py WORK/mlx.jsonl --keep` keeps.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work-mlx}
shift || true
mkdir -p "$work"
if [ ! -x "$work/venv/bin/python" ]; then
    python -m venv "$work/venv"
    "$work/venv/bin/pip" install -q 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
fi
# gpt-oss: the stock class of mlx-lm reads MXFP4 weights alone, and fails on the unpruned tiny model
[ $# -gt 0 ] || set -- qwen2_moe qwen3_moe mixtral olmoe glm4_moe deepseek_v3
python "$here/unequal.py" "$work" "$@"
: > "$work/mlx.jsonl"
for family in "$@"; do
    for which in model pruned; do
        "$work/venv/bin/python" "$here/check_mlx.py" "$work/$family" $which \
            2> "$work/$family/mlx-$which.log" |
            grep '^{"engine"' >> "$work/mlx.jsonl" ||
            echo "$work/$family $which failed: see $work/$family/mlx-$which.log"
    done
done
python "$here/runs.py" "$work/mlx.jsonl"
