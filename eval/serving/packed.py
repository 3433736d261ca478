"""Tiny packed checkpoints, pruned to equal and unequal counts, and what their bytes stand for.

    python eval/serving/packed.py OUT LLMC

LLMC is the python of an environment of llm-compressor, see eval/packed/make_tiny.py. Makes
OUT/HOW/qwen3_moe/ with model, equal and pruned, for every HOW: what llm-compressor packed
(FP8_BLOCK, FP8_DYNAMIC, W4A16), pruned and repaired packed; and what `--save-as` (fp8, w4a16) made
of a bfloat16 model, of which `model` keeps all experts. Beside them expected.json: log-likelihoods
by transformers in float32 on the unpacked weights. `check_vllm.py OUT/HOW/qwen3_moe WHICH --dtype
bfloat16 --how HOW` then compares; vLLM runs packed experts only on CPUs that have AMX.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer
from unequal import NEW, PROMPT, REFERENCE, ROOT, SHORT

import moe_fair
from moe_fair.moe.checkpoint_source import Checkpoint

sys.path.insert(0, str(ROOT / "tests"))
from tiny import tiny_model

# every width a multiple of 128, as squares and groups of published models want
SHAPE = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "moe_intermediate_size": 128, "max_position_embeddings": 1024, "norm_topk_prob": True,
}  # fmt: skip
FAMILY = "qwen3_moe"
PACKED, SAVED = ("FP8_BLOCK", "FP8_DYNAMIC", "W4A16"), ("fp8", "w4a16")


def main() -> None:
    """Make all of them."""
    out, llmc = Path(sys.argv[1]), sys.argv[2]
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = json.loads(next((ROOT / "eval/text/heldout").glob("python*")).open().readline())
    ids = tokenizer(text["text"])["input_ids"][:PROMPT]
    whole = out / "whole"
    tiny_model(FAMILY, vocab_size=len(tokenizer), **SHAPE).bfloat16().save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    for scheme in PACKED:
        folder = out / scheme / FAMILY
        make = [llmc, ROOT / "eval/packed/make_tiny.py", whole, scheme, out / scheme / "made"]
        subprocess.run([*make, "128"], check=True, stdout=subprocess.DEVNULL)
        folder.mkdir(parents=True)
        (out / scheme / "made" / "packed").rename(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        prune(folder / "model", folder)
        expect(folder, ids)
    for name in SAVED:
        folder = out / name / FAMILY
        folder.mkdir(parents=True)
        prune(whole, folder, save_as=name)
        moe_fair.prune(
            str(whole), folder / "model", experts=12, allocate="uniform", repair="none",
            save_as=name, method="frequency", **text_settings(),
        )  # fmt: skip
        expect(folder, ids)


def text_settings() -> dict:
    """Little text: what is chosen does not matter here."""
    return {"calibration": str(ROOT / "eval/text/calibration"), "samples": 16, "length": 64}


def prune(model: Path, folder: Path, **settings: str) -> None:
    """To 7 of 12 experts, each layer's or on average, repaired."""
    for form, method in (("equal", "reap/uniform"), ("pruned", "reap/global")):
        moe_fair.prune(
            str(model), folder / form, experts=7, method=f"{method}+scale", **settings,
            **text_settings(),
        )  # fmt: skip


def expect(folder: Path, ids: list[int]) -> None:
    """What transformers says of each, by what the bytes stand for."""
    found: dict = {"ids": ids, "short": SHORT}
    for which in ("model", "equal", "pruned"):
        model = Checkpoint(str(folder / which)).load("float32", "cpu").eval()
        x = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=x).logits[0].log_softmax(-1)
            new = model.generate(
                x[:, :SHORT], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )[0, SHORT:]
        logprobs = logits[:-1].gather(1, x[0, 1:, None])[:, 0]
        found[which] = {"logprobs": logprobs.tolist(), "greedy": new.tolist()}
    (folder / "expected.json").write_text(json.dumps(found))
    print(folder, flush=True)


if __name__ == "__main__":
    main()
