#!/usr/bin/env bash
# Unequal results of moe_fair in vLLM with the plugin, against transformers, on a CPU.
#
#     bash eval/serving/vllm.sh [WORK] [FAMILY ...]
#
# Needs moe_fair's environment as `python`; makes one of its own for vLLM in WORK/venv. Ends with a
# table; WORK/vllm.jsonl has the rows, which `python eval/serving/runs.py WORK/vllm.jsonl --keep` keeps.
# DeepSeek's pruned checkpoint is held against the masked one in vLLM itself, see unequal.py; MTP heads
# (where no FAMILY is named) against the same checkpoint without and against our own drafting, see heads.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work}
shift || true
mkdir -p "$work"
bash "$here/vllm_venv.sh" "$work"
rm -rf "$work/heads"
if [ $# = 0 ]; then
    set -- qwen2_moe qwen3_moe mixtral olmoe gpt_oss glm4_moe deepseek_v2 deepseek_v3
    python "$here/heads.py" "$work"
fi
python "$here/unequal.py" "$work" "$@"
: > "$work/vllm.jsonl"
check() {
    "$work/venv/bin/python" "$here/${program:-check_vllm.py}" "$@" 2> "$1/vllm-$2.log" |
        grep '^{"engine"' >> "$work/vllm.jsonl" || echo "$1 $2 failed: see $1/vllm-$2.log"
}
for family in "$@"; do
    folder=$work/$family
    check "$folder" model
    case $family in
    deepseek*)
        check "$folder" masked
        check "$folder" pruned --against masked
        ;;
    *) check "$folder" pruned ;;
    esac
    # tensor parallel, of one family
    [ $family != qwen3_moe ] || check "$folder" pruned --tensor-parallel-size 2
done
for folder in "$work"/heads/*/; do # speculative decoding by a model's own MTP head
    [ -f "$folder/expected.json" ] || continue
    for which in model equal pruned; do
        program=check_heads.py check "${folder%/}" $which
    done
done
python "$here/runs.py" "$work/vllm.jsonl"
