"""One checkpoint in vLLM: run in vLLM's own environment, where moe_fair is not installed.

    python eval/serving/check_vllm.py FOLDER WHICH [--against OTHER] [--tensor-parallel-size N]

FOLDER is one that `unequal.py` or `packed.py` has made, WHICH of its checkpoints. Prints a line of
JSON: how far the log-likelihoods of the prompt lie from transformers' (or from those of another
checkpoint that vLLM was given before), and whether the greedy continuation is the same.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from runs import row

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def main() -> None:
    """Load, score, generate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("which")
    parser.add_argument("--against", default="transformers")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--how", default="", help="what the row says of how it is stored")
    args = parser.parse_args()
    if args.tensor_parallel_size == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm
    from vllm.inputs import TokensPrompt

    expected = json.loads((args.folder / "expected.json").read_text())
    ids, short = expected["ids"], expected["short"]
    model = vllm.LLM(
        model=str(args.folder / args.which),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        enable_prefix_caching=False,
        disable_log_stats=True,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    score = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    [scored] = model.generate([TokensPrompt(prompt_token_ids=ids)], score, use_tqdm=False)
    new = len(expected[args.which]["greedy"])
    greedy = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    [said] = model.generate([TokensPrompt(prompt_token_ids=ids[:short])], greedy, use_tqdm=False)
    found = {
        "logprobs": [scored.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))],
        "greedy": list(said.outputs[0].token_ids),
    }
    size = args.tensor_parallel_size
    how = f"tensor parallel {size}" if size > 1 else args.how
    print(row("vllm", vllm.__version__, args.folder, args.which, found, args.against, how))


if __name__ == "__main__":
    main()
