"""Speculative decoding by the MTP head of one checkpoint in vLLM: run in vLLM's own environment.

    python eval/serving/check_heads.py FOLDER WHICH

FOLDER is one that `heads.py` has made, WHICH of its checkpoints. Prints a line of JSON: whether the
greedy continuations with the head are those without it, how many tokens were drafted and how many
of these accepted, there and by moe_fair.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

from runs import COUNTS

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
COUNTED = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")


def main() -> None:
    """Without the head, with it, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("which")
    args = parser.parse_args()
    import vllm

    expected = json.loads((args.folder / "expected.json").read_text())
    prompts, ours = expected["prompts"], expected[args.which]
    alone, _ = said(str(args.folder / args.which), prompts, len(ours["greedy"][0]))
    head = {"method": "mtp", "num_speculative_tokens": 1}
    with_head, counted = said(
        str(args.folder / args.which), prompts, len(ours["greedy"][0]), speculative_config=head
    )
    print(
        json.dumps(
            {
                "engine": "vllm", "version": vllm.__version__,
                "date": datetime.date.today().isoformat(), "family": args.folder.name,
                "counts": COUNTS[args.which], "how": "MTP head", "against": "without the head",
                "tokens_equal": with_head == alone,
                "transformers_equal": alone == ours["greedy"],
                "drafted": [counted[0], ours["drafted"]],
                "accepted": [counted[1], ours["accepted"]],
            }
        )
    )  # fmt: skip


def said(
    model: str, prompts: list[list[int]], new: int, **options: Any
) -> tuple[list[list[int]], list[int]]:
    """Greedy continuations, and the tokens that were drafted and accepted."""
    import vllm
    from vllm.inputs import TokensPrompt

    served = vllm.LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
        enable_prefix_caching=False, disable_log_stats=False, **options,
    )  # fmt: skip
    greedy = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    found = served.generate(
        [TokensPrompt(prompt_token_ids=p) for p in prompts], greedy, use_tqdm=False
    )
    metrics = {m.name: m for m in served.get_metrics()}
    counted = [int(metrics[name].value) if name in metrics else 0 for name in COUNTED]
    return [list(r.outputs[0].token_ids) for r in found], counted


if __name__ == "__main__":
    main()
