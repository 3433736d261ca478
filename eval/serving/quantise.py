"""Quantise a pruned checkpoint with llm-compressor and load it again.

    python eval/serving/quantise.py MODEL TEXT.jsonl (FP8_DYNAMIC|W4A16) OUT

Run in an environment of llm-compressor, where moe_fair is not installed. Experts are quantised one
by one: transformers keeps them fused, which `Linear` does not name, so `linearize_moe` takes them
apart first; it builds every layer from its experts' own config, which says the layer's own number.

Prints a line of JSON: the mean negative log-likelihood of the text before, quantised in memory, and
loaded again; and, of FP8, how far the experts that are loaded again lie from the numbers of the
saved file times their scales, multiplied out here, relative to the largest (.004 is the rounding
of bfloat16).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENTS, LENGTH = 32, 256
IGNORED = ["lm_head", "re:.*gate$", "re:.*router$"]
# in groups of 128 by itself, which do not divide the widths of tiny models
GROUPS = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=16
    ),
)


def main() -> None:
    """Load, quantise, save, load."""
    model, text, scheme, out = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = Path(text).read_text().splitlines()[:DOCUMENTS]
    tokens = [tokenizer(json.loads(x)["text"])["input_ids"][:LENGTH] for x in lines]
    found = load(model)
    before = loss(found, tokens)
    linearize_moe(found)
    if abs(loss(found, tokens) - before) > 1e-5:
        raise SystemExit("taking the experts apart has changed the model")
    how = {"scheme": scheme} if scheme != "W4A16" else {"config_groups": {"group_0": GROUPS}}
    recipe = QuantizationModifier(targets="Linear", ignore=IGNORED, **how)
    oneshot(model=found, recipe=recipe)
    quantised = loss(found, tokens)
    found.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    again = load(out)
    row = {
        "engine": "llm-compressor", "version": importlib.metadata.version("llmcompressor"),
        "date": datetime.date.today().isoformat(), "family": "qwen2_moe",
        "counts": Path(model).name, "how": scheme, "against": "unquantised",
        "losses": [before, quantised, loss(again, tokens)],
        "bytes": [sum(f.stat().st_size for f in Path(m).glob("*.safetensors"))
                  for m in (model, out)],
    }  # fmt: skip
    if scheme == "FP8_DYNAMIC":
        row["experts_differ"] = experts_differ(again, multiplied_out(model, out))
    print(json.dumps(row))


def load(folder: str) -> torch.nn.Module:
    """With our own file where it has one."""
    found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    return found.eval()


@torch.no_grad()
def loss(model: torch.nn.Module, documents: list[list[int]]) -> float:
    """Mean negative log-likelihood of each next token."""
    total = count = 0.0
    for ids in documents:
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens).logits[0].float().log_softmax(-1)
        total -= float(logits[:-1].gather(1, tokens[0, 1:, None]).sum())
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def experts_differ(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference of two models' experts, relative to the largest number."""
    theirs = {n: p.float() for n, p in b.named_parameters() if ".experts." in n}
    mine = {n: p.float() for n, p in a.named_parameters() if ".experts." in n}
    assert mine.keys() == theirs.keys()
    assert theirs
    most = max(float(p.abs().max()) for p in theirs.values())
    return max(float((mine[n] - p).abs().max()) for n, p in theirs.items()) / most


def multiplied_out(model: str, quantised: str) -> torch.nn.Module:
    """The model with the weights of the quantised file: numbers times their channel's scale."""
    folder = Path(quantised) / "plain"
    folder.mkdir()
    saved = load_file(Path(quantised) / "model.safetensors")
    plain = {}
    for name, t in saved.items():
        scale = saved.get(f"{name}_scale")
        if not name.endswith("_scale"):
            plain[name] = t.float() * scale.float() if scale is not None else t.float()
    for file in Path(model).glob("*.*"):
        if file.suffix in (".json", ".py") and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    return load(str(folder))


if __name__ == "__main__":
    main()
