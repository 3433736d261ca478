"""Tiny checkpoints with a head for multi-token prediction (MTP), and what moe_fair drafts with it.

    python eval/serving/heads.py OUT [FAMILY ...]

For each family OUT/heads/FAMILY/model (random weights), OUT/heads/FAMILY/pruned (by `moe-fair
prune`, half of the experts, unequal by layer, the head cut), OUT/heads/FAMILY/equal (7 in every
layer and in the head) and OUT/heads/FAMILY/expected.json: prompts, and of each checkpoint the
greedy continuations by transformers in float32, and how many of their tokens the head drafts, one
at a time, and how many of these are right.

A random head is never right. Here the model and its head both lean on the last token's embedding,
so that they often agree and often do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from unequal import LATENT, REFERENCE, ROOT, SHAPE, as_published, prune

sys.path.insert(0, str(ROOT / "tests" / "published"))
from mtp_replicas import Replica, one_more_layer, write_replica

from moe_fair.engines.decoder import find_decoder
from moe_fair.engines.layer_calls import call_layers
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.mtp_head import HeadRunner

EXPERTS = {"n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 4,
           "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1}  # fmt: skip
FAMILIES = {
    "glm4_moe": one_more_layer("glm4_moe", 5, SHAPE | EXPERTS),
    "deepseek_v3": one_more_layer(
        "deepseek_v3", 5, LATENT | EXPERTS | {"q_lora_rank": 64, "topk_method": "noaux_tc"}
    ),
}
PROMPTS, SHORT, NEW = 8, 48, 32


def main() -> None:
    """Make those that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    file = next((ROOT / "eval/text/heldout").glob("python*"))
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()[:PROMPTS]]
    prompts = [tokenizer(text)["input_ids"][:SHORT] for text in texts]
    for name in args.families or list(FAMILIES):
        folder = args.out / "heads" / name
        shutil.rmtree(folder, ignore_errors=True)
        write_replica(FAMILIES[name], folder / "model")
        as_published(folder / "model" / "config.json", name)
        lean(FAMILIES[name], folder / "model")
        found = {"prompts": prompts}
        for form, method in {"pruned": "second-order", "equal": "second-order/uniform"}.items():
            prune(folder, form, method)
        for which in ("model", "pruned", "equal"):
            found[which] = expected(folder / which, prompts)
            print(name, which, {k: v for k, v in found[which].items() if k != "greedy"}, flush=True)
        (folder / "expected.json").write_text(json.dumps(found))
        ours = json.loads((folder / "pruned/config.json").read_text()).get("moe_fair")
        if ours is None:
            raise SystemExit(f"{folder}/pruned: the layers keep as many each")
        print(name, ours["experts"], ours["mtp"], flush=True)


def lean(replica: Replica, folder: Path) -> None:
    """What attention and experts add becomes less, and the head begins with the last token."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, t in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # some layers more than others, so that counts differ
                t *= 0.6 / (1 + int(name.split("layers.")[1].split(".")[0]))
            if name.endswith("embed_tokens.weight"):
                t *= 12  # to about 1, what the norms make of it
            if name == replica.around["projection"]:
                t *= 0.1
                t[:, : len(t)] += torch.eye(len(t))
        save_file(tensors, file, {"format": "pt"})


@torch.no_grad()
def expected(folder: Path, prompts: list[list[int]]) -> dict:
    """Continuations by transformers, and what the head drafts of them."""
    source = Checkpoint(str(folder), trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=folder.name == "pruned"
    ).eval()
    found: dict = {"greedy": [], "drafted": 0, "accepted": 0}
    with HeadRunner(source, model, torch.float32, torch.device("cpu")) as runner:
        [head] = runner.heads
        for prompt in prompts:
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )
            last = model.base_model(input_ids=ids).last_hidden_state
            embedded, calls = call_layers(find_decoder(model), ids[:, 1:], None)
            embedded[:, 0] = 0  # as vLLM's heads of these families do
            output = head.forward(embedded, last[:, :-1], calls)
            drafts = model.get_output_embeddings()(output)[0].argmax(-1)
            at, said = len(prompt), ids[0].tolist()
            while at < len(said) - 1:  # the token at `at` is known, that after it is drafted
                right = int(drafts[at - 1]) == said[at + 1]
                found["drafted"] += 1
                found["accepted"] += right
                at += 1 + right
            found["greedy"].append(said[len(prompt) :])
    return found


if __name__ == "__main__":
    main()
