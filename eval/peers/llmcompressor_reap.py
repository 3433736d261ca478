"""REAP scores as llm-compressor's own REAPPruningModifier accumulates them.

    python llmcompressor_reap.py MODEL BATCHES SCORES [--counts COUNTS]

Runs in the peer's environment (eval/compare_reap.py says how to build it) and imports nothing of
ours. The modifier is taken as far as its calibration start, where it registers its hooks and
trackers; the batches then run through the whole model, and the trackers are read before any layer
is cut. Its `oneshot` flow instead cuts layer by layer and, by default, measures each layer behind
the layers that are already cut.

Written and read against llmcompressor 0.14.0.1. Its score: float64 sums of (weight that the router
hands to the experts) · (float32 norm of the expert's output before that weight), over the expert's
routed tokens, divided by max(their number, 1). The weight is not renormalised beyond what the model
does, an expert without tokens scores 0, and padding counts like text, so give unpadded batches.

MODEL is a local directory, BATCHES a .safetensors or .npz file of int64 [B, L] token ids named
batch_0, batch_1, ...; SCORES becomes JSON {layer: [score of each expert]}, COUNTS JSON {layer: one
list after each batch: [routed tokens of each expert so far]}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor.core import Event, EventType, State
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

UNUSED_SPARSITY = 0.5  # the modifier wants one; nothing is cut here
ByLayer = dict[int, list[Any]]


def main() -> None:
    """Score the experts of one model and write the files."""
    args = _arguments()
    scores, counts = track(load(args.model), read_batches(args.batches))
    _write(args.scores, scores)
    if args.counts:
        _write(args.counts, counts)


def load(model: Path) -> Any:
    """The model in float32 on the CPU, its fused experts made single modules by the peer.

    `load_quantizable_moe`, its faster way to the same modules, fails where torchvision is missing.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    linearize_moe(loaded)
    kinds = {p.dtype for p in loaded.parameters()}
    if kinds != {torch.float32}:
        raise ValueError(f"{model}: loaded as {kinds}, not as float32 alone")
    return loaded.eval()


def read_batches(path: Path) -> Iterator[torch.Tensor]:
    """Token ids [B, L] in the order of their numbers."""
    arrays = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    for i in range(len(arrays)):
        yield torch.from_numpy(arrays[f"batch_{i}"])


@torch.no_grad()
def track(model: Any, batches: Iterable[torch.Tensor]) -> tuple[ByLayer, ByLayer]:
    """Scores, and running token counts, of the modifier's trackers behind its own hooks."""
    modifier = REAPPruningModifier(sparsity=UNUSED_SPARSITY)
    state = State(model=model)
    modifier.initialize(state)
    modifier.update_event(state, Event(type_=EventType.CALIBRATION_START))
    trackers = {_layer(name): t for name, t in modifier._saliency_trackers.items()}
    counts: ByLayer = {layer: [] for layer in trackers}
    for ids in batches:
        model(input_ids=ids, use_cache=False)
        for layer, tracker in trackers.items():
            counts[layer].append(tracker.count.tolist())
    modifier.update_event(state, Event(type_=EventType.CALIBRATION_END))
    return {layer: t.mean_saliency.tolist() for layer, t in trackers.items()}, counts


def _write(path: Path, values: ByLayer) -> None:
    path.write_text(json.dumps(values) + "\n")


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--counts", type=Path, help="also write numbers of routed tokens")
    return parser.parse_args()


if __name__ == "__main__":
    main()
