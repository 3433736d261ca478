#!/usr/bin/env bash
# Results of moe_fair as GGUF in node-llama-cpp, whose llama.cpp is a prebuilt binary, on a CPU.
#
#     LLAMA_CPP=SOURCE bash eval/serving/node.sh [WORK] [FAMILY ...]
#
# SOURCE is as for gguf.sh, for its converter; npm fetches node-llama-cpp into WORK/node. Needs moe_fair's
# environment as `python`, and in it what the converter imports. Equal results are converted and compared;
# unequal ones are refused by `moe-fair export`, and, converted all the same, by the binary. Ends with a
# table; `python eval/serving/runs.py WORK/node.jsonl --keep` keeps it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(realpath -m "${1:-serving-work-node}")
shift || true
: "${LLAMA_CPP:?a copy of the source of llama.cpp}"
export LLAMA_CPP
mkdir -p "$work/node"
cd "$work/node"
[ -d node_modules/node-llama-cpp ] || npm install --prefix . --silent --no-audit --no-fund \
    --ignore-scripts node-llama-cpp@3.22.1
LLAMA_CPP_VERSION=$(node -p 'require("./node_modules/node-llama-cpp/llama/binariesGithubRelease.json").release')
export LLAMA_CPP_VERSION
how="node-llama-cpp $(node -p 'require("./node_modules/node-llama-cpp/package.json").version')"
[ $# -gt 0 ] || set -- qwen2_moe qwen3_moe mixtral olmoe gpt_oss glm4_moe deepseek_v2 deepseek_v3
python "$here/unequal.py" --equal "$work" "$@"
: > "$work/node.jsonl"
for family in "$@"; do
    folder=$work/$family
    for which in model equal; do
        python -m moe_fair.cli export "$folder/$which" --to gguf -o "$folder/$which.gguf" --outtype f32 \
            --converter "$here/convert_tiny.py" 2> "$folder/$which-export.log" &&
            python "$here/check_gguf.py" "$here/check_node.mjs" "$folder" $which --how "$how" \
                2> "$folder/node-$which.log" >> "$work/node.jsonl" ||
            echo "$family $which failed: see $folder/$which-export.log and node-$which.log"
    done
    if python -m moe_fair.cli export "$folder/pruned" --to gguf -o "$folder/pruned.gguf" --outtype f32 \
        --converter "$here/convert_tiny.py" 2> "$folder/pruned-export.log"; then
        echo "$family: unequal, and not refused" && exit 1
    fi
    CONVERTER=$here/../../serving/llama.cpp/convert_per_layer.py python "$here/convert_tiny.py" \
        "$folder/pruned" --outfile "$folder/pruned.gguf" --outtype f32 2> "$folder/pruned-per-layer.log"
    if node "$here/check_node.mjs" "$folder/pruned.gguf" 1 1 5 6 > /dev/null 2> "$folder/node-pruned.log"; then
        echo "$family: unequal, and the binary takes it"
    else
        echo "$family, unequal: $(tail -1 "$folder/pruned-export.log")"
    fi
done
python "$here/runs.py" "$work/node.jsonl"
