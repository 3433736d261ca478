#!/usr/bin/env bash
# lm-eval against vLLM's server, which serves an unequal result, and `moe-fair eval` on the same items.
#
#     bash eval/serving/server.sh [WORK] [LIMIT]
#
# Needs moe_fair's environment as `python`; vLLM's is WORK/venv (made by vllm.sh where it is not there),
# lm-eval's client gets one of its own. Prunes the reference model to 40 of 60 experts a layer; ends with
# what both say, and fails where they differ. WORK/runs.jsonl gets a row for each task.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-serving-work}
limit=${2:-1000000}
port=${PORT:-8123}
mkdir -p "$work"
bash "$here/vllm_venv.sh" "$work"
if [ ! -x "$work/lm-eval/bin/lm_eval" ]; then
    python -m venv "$work/lm-eval"
    "$work/lm-eval/bin/pip" install -q 'lm_eval[api]==0.4.13' transformers==5.23.0
fi
tasks=local_choice_python,local_passages_python
out=$work/reference
rm -rf "$out" "$work/server" "$work/client"
python -m moe_fair.cli prune "$here/../tiny-qwen2-moe" -o "$out" --experts 40 \
    -c "$here/../text/calibration" --samples 64 --method reap/global --repair none > "$work/prune.log"
VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
    "$work/venv/bin/python" -m vllm.entrypoints.openai.api_server --model "$out" \
    --served-model-name pruned --dtype float32 --enforce-eager --port "$port" 2> "$work/server.log" >&2 &
server=$!
trap 'kill $server' EXIT
python -m moe_fair.cli eval "$out" --tasks $tasks --include-path "$here/../tasks" --limit "$limit" \
    --dtype float32 --log-samples -o "$work/server" > "$work/eval.log"
for _ in $(seq 120); do
    curl -sf "http://127.0.0.1:$port/v1/models" > "$work/models.json" && break
    kill -0 $server || { echo "the server ended: see $work/server.log"; exit 1; }
    sleep 5
done
"$work/lm-eval/bin/lm_eval" --model local-completions --model_args \
    "base_url=http://127.0.0.1:$port/v1/completions,model=pruned,tokenizer=$out,max_length=1024,num_concurrent=4" \
    --tasks $tasks --include_path "$here/../tasks" --limit "$limit" --log_samples \
    --output_path "$work/client" > "$work/client.log" 2>&1
python "$here/check_server.py" "$work" >> "$work/runs.jsonl"
tail -n 2 "$work/runs.jsonl"
