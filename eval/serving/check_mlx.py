"""One checkpoint in mlx-lm: run in an environment with mlx-lm, where moe_fair is not installed.

    python eval/serving/check_mlx.py FOLDER (model|pruned)

FOLDER is one that `unequal.py` has made. Prints a line of JSON: how far the log-likelihoods of
the prompt lie from transformers', and whether the greedy continuation is the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model
from runs import row


def main() -> None:
    """Load, score, generate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("which", choices=("model", "pruned"))
    args = parser.parse_args()
    expected = json.loads((args.folder / "expected.json").read_text())
    ids, short = expected["ids"], expected["short"]
    model, _ = load_model(args.folder / args.which, trust_remote_code=True)
    model.set_dtype(mx.float32)
    model.eval()

    def scores(tokens: list[int]) -> mx.array:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    at = scores(ids)
    logprobs = [at[i - 1, ids[i]].item() for i in range(1, len(ids))]
    said = list(ids[:short])
    for _ in expected[args.which]["greedy"]:
        said.append(mx.argmax(scores(said)[-1]).item())
    found = {"logprobs": logprobs, "greedy": said[short:]}
    version = importlib.metadata.version("mlx-lm")
    print(row("mlx", version, args.folder, args.which, found, "transformers"))


if __name__ == "__main__":
    main()
