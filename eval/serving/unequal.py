"""Tiny checkpoints whose layers keep different numbers of experts, and what transformers says.

    python eval/serving/unequal.py [--equal] OUT [FAMILY ...]

For each family OUT/FAMILY/model (random weights), OUT/FAMILY/pruned (by `moe-fair prune`, half of
the experts, unequal by layer) and OUT/FAMILY/expected.json: the tokens of a prompt, the
log-likelihood of each under each of both models in float32, and the greedy continuation. With
--equal also OUT/FAMILY/equal, whose layers keep 7 experts each.

Where an engine gives other numbers than transformers whatever the experts (DeepSeek in vLLM on a
CPU, gpt-oss in llama.cpp), also OUT/FAMILY/masked: the unpruned model whose routers never choose
the experts that left. It is a stock checkpoint, and says what the pruned one should do there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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
    "qwen3_moe": SHAPE | {"norm_topk_prob": True},  # as published; llama.cpp knows no other
    "mixtral": SHAPE | {"intermediate_size": 64},
    "olmoe": SHAPE | {"num_key_value_heads": 4, "intermediate_size": 64},
    "gpt_oss": SHAPE
    | {"intermediate_size": 64, "sliding_window": 64, "max_position_embeddings": 131072},
    "glm4_moe": SHAPE | {"n_group": 1, "topk_group": 1},
    "deepseek_v2": LATENT | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": LATENT
    | {"n_group": 1, "topk_group": 1, "q_lora_rank": 64, "topk_method": "noaux_tc"},
    # held out: the plugin was written without them
    "ernie4_5_moe": SHAPE | {"intermediate_size": 64},
    "hunyuan_v1_moe": SHAPE | {"intermediate_size": 64},
    "dots1": SHAPE | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "granitemoe": SHAPE | {"intermediate_size": 64},
    "phimoe": SHAPE | {"intermediate_size": 64},
    "flex_olmo": SHAPE | {"intermediate_size": 64},
    "exaone_moe": SHAPE | {"n_group": 1, "topk_group": 1},
}
MASKED = ("deepseek_v2", "deepseek_v3", "gpt_oss")
# vLLM's router on a CPU passes over a selection bias where experts have no groups
UNBIASED = ("ernie4_5_moe",)
# what published configs say; where it is missing engines take softmax
SCORES = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "dots1": "sigmoid"}
PROMPT, SHORT, NEW = 160, 64, 24


def prune(folder: Path, form: str, method: str) -> None:
    """FOLDER/model with seven experts a layer on average as FOLDER/FORM."""
    subprocess.run(
        [sys.executable, "-m", "moe_fair.cli", "prune", folder / "model", "-o", folder / form,
         "--experts", "7", "-c", ROOT / "eval/text/calibration", "--samples", "8", "--length", "64",
         "--method", method, "--repair", "none"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> None:
    """Make those that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*")
    args = parser.parse_args()
    out, names = args.out, args.families or list(FAMILIES)
    forms = {"pruned": "second-order"}
    if args.equal:
        forms["equal"] = "second-order/uniform"
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = json.loads(next((ROOT / "eval/text/heldout").glob("python*")).open().readline())
    ids = tokenizer(text["text"])["input_ids"][:PROMPT]
    for name in names:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model = tiny_model(name, vocab_size=len(tokenizer), **FAMILIES[name])
        if name == "deepseek_v2":
            _hold_one_feature(model)
        for key, t in model.state_dict().items():
            if name in UNBIASED and key.endswith("e_score_correction_bias"):
                t.zero_()
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        as_published(folder / "model" / "config.json", name)
        for form, method in forms.items():
            prune(folder, form, method)
        if name in MASKED:
            _write_masked(folder)
        found = {"ids": ids, "short": SHORT}
        for which in ("model", *forms, *(["masked"] if name in MASKED else [])):
            found[which] = _measured(folder / which, ids)
        if name in MASKED:
            pairs = zip(found["pruned"]["logprobs"], found["masked"]["logprobs"], strict=True)
            if max(abs(a - b) for a, b in pairs) > 1e-5:
                raise SystemExit(f"{folder}: masked is not what pruned is, in transformers")
        (folder / "expected.json").write_text(json.dumps(found))
        ours = json.loads((folder / "pruned/config.json").read_text())["moe_fair"]["experts"]
        print(name, ours, flush=True)


@torch.no_grad()
def _hold_one_feature(model: PreTrainedModel) -> None:
    """Feature 0 is the same positive number for every token, and no layer adds to it.

    A router without a bias can then be told to never choose an expert: by its weight for this one.
    """
    model.get_input_embeddings().weight[:, 0] = 0.05
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            p[..., 0, :] = 0  # rows are outputs, of all experts where they are fused


@torch.no_grad()
def _write_masked(folder: Path) -> None:
    """The model whose routers give the experts that `pruned` lacks no weight at all."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for group in json.loads((folder / "pruned/moe_fair/plan.json").read_text())["groups"]:
        gone = sorted({*range(group["size"])} - {*group["kept"]})
        block = model.get_submodule(group["name"])
        router = block.router if hasattr(block, "router") else block.gate
        bias = getattr(router, "e_score_correction_bias", getattr(router, "bias", None))
        if bias is not None:
            bias[gone] = -1e4
        else:  # see _hold_one_feature
            router.weight[gone] = 0
            router.weight[gone, 0] = -1e4
    shutil.copytree(folder / "model", folder / "masked")
    model.save_pretrained(folder / "masked")
    shutil.copy(folder / "model/config.json", folder / "masked")


def as_published(file: Path, name: str) -> None:
    """Keys as publishers write them: transformers 5 saves others, which mlx-lm does not read."""
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters", {})
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        config |= {"rope_scaling": None, **{k: v for k, v in rope.items() if k != "rope_type"}}
    elif rope:
        config["rope_parameters"] = rope
    if name in SCORES:
        config["scoring_func"] = SCORES[name]
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
    logprobs = logits[:-1].gather(1, x[0, 1:, None])[:, 0]
    return {"logprobs": logprobs.tolist(), "greedy": new.tolist()}


if __name__ == "__main__":
    main()
