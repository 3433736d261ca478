#!/usr/bin/env bash
# Prune, then quantise: FP8 and W4A16 by llm-compressor, of equal and unequal results, on a CPU.
#
#     bash eval/serving/llm-compressor.sh [WORK]
#
# Needs moe_fair's environment as `python`; makes one of its own for llm-compressor in WORK/venv.
# Prunes the reference model to 40 of 60 experts a layer; ends with a table; WORK/quantised.jsonl has
# the rows, which `python eval/serving/runs.py WORK/quantised.jsonl --keep` keeps.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work-quantised}
mkdir -p "$work"
if [ ! -x "$work/venv/bin/python" ]; then
    python -m venv "$work/venv"
    "$work/venv/bin/pip" install -q llmcompressor==0.14.0.1
fi
text=$(ls "$here"/../text/heldout/python*)
rm -rf "$work"/equal* "$work"/unequal*
for form in equal unequal; do
    method=reap/global
    [ $form = unequal ] || method=reap/uniform
    python -m moe_fair.cli prune "$here/../tiny-qwen2-moe" -o "$work/$form" --experts 40 \
        -c "$here/../text/calibration" --samples 64 --method $method --repair none > /dev/null
done
: > "$work/quantised.jsonl"
for form in equal unequal; do
    for scheme in FP8_DYNAMIC W4A16; do
        "$work/venv/bin/python" "$here/quantise.py" "$work/$form" "$text" $scheme \
            "$work/$form-$scheme" 2> "$work/$form-$scheme.log" | grep '^{"engine"' \
            >> "$work/quantised.jsonl" || echo "$form $scheme failed: see $work/$form-$scheme.log"
    done
done
python "$here/runs.py" "$work/quantised.jsonl"
