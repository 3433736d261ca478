#!/usr/bin/env bash
# Prune, then quantise: FP8 and W4A16 by llm-compressor, of equal and unequal results, on a CPU.
#
#     bash eval/serving/llm-compressor.sh [WORK]
#
# Needs moe_fair's environment as `python`; makes one of its own for llm-compressor in WORK/venv.
# Prunes the reference model to 40 of 60 experts a layer; ends with a table; WORK/quantised.jsonl has
# the rows.
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
            "$work/$form-$scheme" 2> "$work/$form-$scheme.log" | grep '^{"model"' \
            >> "$work/quantised.jsonl" || echo "$form $scheme failed: see $work/$form-$scheme.log"
    done
done
python - "$work/quantised.jsonl" <<'PY'
import json, sys
from pathlib import Path

print("| result | scheme | loss before | quantised | loaded again | experts differ | bytes |")
print("|---|---|---|---|---|---|---|")
for line in open(sys.argv[1]):
    r = json.loads(line)
    differ = f"{r['experts_differ']:.4f}" if "experts_differ" in r else "-"
    print(f"| {Path(r['model']).name} | {r['scheme']} | {r['before']:.4f} | {r['quantised']:.4f} "
          f"| {r['reloaded']:.4f} | {differ} | {r['bytes'][0]:,} -> {r['bytes'][1]:,} |")
PY
