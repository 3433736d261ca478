"""Tiny checkpoints whose layers keep different numbers of experts, and what transformers says.

    python eval/serving/unequal.py OUT [FAMILY ...]

For each family OUT/FAMILY/model (random weights), OUT/FAMILY/pruned (by `moe-fair prune`, half of
the experts, unequal by layer) and OUT/FAMILY/expected.json: the tokens of a prompt, the mean
negative log-likelihood of each of both models in float32, and the greedy continuation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from tiny import tiny_model  # noqa: E402

REFERENCE = ROOT / "eval" / "tiny-qwen2-moe"
# what engines' kernels want: heads of 32 and more, widths that divide
SHAPE = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "moe_intermediate_size": 64, "max_position_embeddings": 1024, "sliding_window": None,
}  # fmt: skip
LATENT = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    "head_dim": 64, "moe_intermediate_size": 64, "max_position_embeddings": 1024,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "qwen2_moe": SHAPE,
    "qwen3_moe": SHAPE,
    "mixtral": SHAPE | {"intermediate_size": 64},
    "olmoe": SHAPE | {"num_key_value_heads": 4, "intermediate_size": 64},
    "gpt_oss": SHAPE | {"intermediate_size": 64, "sliding_window": 64},
    "glm4_moe": SHAPE | {"n_group": 1, "topk_group": 1},
    "deepseek_v2": LATENT | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": LATENT
    | {"n_group": 1, "topk_group": 1, "q_lora_rank": 64, "topk_method": "noaux_tc"},
}
PROMPT, SHORT, NEW = 160, 64, 24


def main() -> None:
    """Make those that are named, or all."""
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = json.loads(next((ROOT / "eval/text/heldout").glob("python*")).open().readline())
    ids = tokenizer(text["text"])["input_ids"][:PROMPT]
    for name in names:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model = tiny_model(name, vocab_size=len(tokenizer), **FAMILIES[name])
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        _as_published(folder / "model" / "config.json", name)
        subprocess.run(
            [sys.executable, "-m", "moe_fair.cli", "prune", folder / "model", "-o",
             folder / "pruned", "--experts", "7", "-c", ROOT / "eval/text/calibration",
             "--samples", "8", "--length", "64", "--method", "second-order", "--repair", "none"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = {"ids": ids, "short": SHORT}
        for which in ("model", "pruned"):
            found[which] = _measured(folder / which, ids)
        (folder / "expected.json").write_text(json.dumps(found))
        config = json.loads((folder / "pruned/config.json").read_text())
        print(name, config["per_layer_config"], flush=True)


def _as_published(file: Path, name: str) -> None:
    """Keys as publishers write them: transformers 5 saves others, which mlx-lm does not read."""
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters", {})
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        config |= {"rope_scaling": None, **{k: v for k, v in rope.items() if k != "rope_type"}}
    elif rope:
        config["rope_parameters"] = rope
    if name == "qwen3_moe" and "num_experts" not in config:
        config["num_experts"] = config.pop("num_local_experts")
    file.write_text(json.dumps(config, indent=2))


def _measured(folder: Path, ids: list[int]) -> dict:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=folder.name == "pruned"
    ).eval()
    x = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=x).logits[0].log_softmax(-1)
        new = model.generate(x[:, :SHORT], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[
            0, SHORT:
        ]
    nll = -logits[:-1].gather(1, x[0, 1:, None]).mean()
    return {"nll": float(nll), "greedy": new.tolist()}


if __name__ == "__main__":
    main()
