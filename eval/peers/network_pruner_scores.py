"""CPU seconds of network-pruner's own scores.

    python network_pruner_scores.py FOLDER LAYER...

Runs in the peer's environment with this repository on PYTHONPATH (for the definition of the net
alone). FOLDER holds `weights.safetensors` and `images.safetensors` (images and labels); the last
line printed is JSON. Its public `get_metrics` is called; the two functions that it spends its time
in are timed where it calls them.

Written against network-pruner 2.16.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from Network_Pruner import get_metrics
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from moe_fair.vision import zoo

INTERNALS = sys.modules["Network_Pruner.FAIR_Pruner"]


def main() -> None:
    """Score the named layers and print the times."""
    folder, layers = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    found = load_file(folder / "images.safetensors")
    images, labels = found["images"], found["labels"]
    model = zoo.vgg16_bn(int(labels.max()) + 1)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    places = [i for i, (n, _) in enumerate(model.named_modules()) if n in layers]
    spent = {
        "u": timed("_get_layer_distance"),
        "r": timed("_get_reconstructionScore_fast"),
    }
    data = TensorDataset(images, labels)
    data.classes = [str(i) for i in range(int(labels.max()) + 1)]  # type: ignore[attr-defined]
    get_metrics(
        model,
        DataLoader(data, batch_size=64),
        places,
        the_samplesize_for_compute_distance=int(labels.bincount().max()),
        results_save_path=str(folder / "results.pkl"),
    )
    times = {f"{k}_{unit}": s for k, v in spent.items() for unit, s in v.items()}
    version = importlib.metadata.version("network-pruner")
    print(json.dumps({"version": version, "layers": len(places), **times}))


def timed(name: str) -> dict[str, float]:
    """Replace an internal function by itself with a clock; returns what the clock adds to."""
    stock: Callable[..., Any] = getattr(INTERNALS, name)
    spent = {"cpu": 0.0, "wall": 0.0}

    def clocked(*args: Any, **kwargs: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = stock(*args, **kwargs)
        spent["cpu"] += time.process_time() - cpu
        spent["wall"] += time.perf_counter() - wall
        print(f"{name}: {spent['cpu']:.1f} s", file=sys.stderr, flush=True)
        return result

    setattr(INTERNALS, name, clocked)
    return spent


if __name__ == "__main__":
    main()
