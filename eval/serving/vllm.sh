#!/usr/bin/env bash
# Unequal results of moe_fair in vLLM with the plugin, against transformers, on a CPU.
#
#     bash eval/serving/vllm.sh [WORK] [FAMILY ...]
#
# Needs moe_fair's environment as `python`; makes one of its own for vLLM in WORK/venv. Ends with a
# table; WORK/vllm.jsonl has the rows, which `python eval/serving/runs.py WORK/vllm.jsonl --keep` keeps.
# DeepSeek's pruned checkpoint is held against the masked one in vLLM itself, see unequal.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work}
shift || true
mkdir -p "$work"
bash "$here/vllm_venv.sh" "$work"
python "$here/unequal.py" "$work" "$@"
: > "$work/vllm.jsonl"
check() {
    "$work/venv/bin/python" "$here/check_vllm.py" "$@" 2> "$1/vllm-$2.log" |
        grep '^{"engine"' >> "$work/vllm.jsonl" || echo "$1 $2 failed: see $1/vllm-$2.log"
}
for folder in "$work"/*/; do
    folder=${folder%/}
    [ -f "$folder/expected.json" ] || continue
    check "$folder" model
    case ${folder##*/} in
    deepseek*)
        check "$folder" masked
        check "$folder" pruned --against masked
        ;;
    *) check "$folder" pruned ;;
    esac
    # tensor parallel, of one family
    [ "${folder##*/}" != qwen3_moe ] || check "$folder" pruned --tensor-parallel-size 2
done
python "$here/runs.py" "$work/vllm.jsonl"
