"""Top-1 accuracy and latency of an image classifier."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moe_fair.vision.data import ImageSet
from moe_fair.vision.graph import logits

BATCHES = (1, 4, 8)
RUNS = 15


def top1(model: nn.Module, images: ImageSet, batch_size: int) -> float:
    """Share of the images whose highest output is the label, 0 to 1."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in DataLoader(images, batch_size):
            right += int((logits(model, x.to(device)).argmax(-1) == y.to(device)).sum())
    model.train(training)
    return right / len(images)


def latency(
    models: dict[str, nn.Module], image: Tensor, batches: Sequence[int] = BATCHES, runs: int = RUNS
) -> list[dict[str, float]]:
    """Median milliseconds of one forward at each batch size, the models taking turns.

    Args:
        models: name -> model, on one device.
        image: [1, C, H, W].

    Returns:
        a row for each batch size: `batch`, and `NAME` in milliseconds.
    """
    rows = []
    for batch in batches:
        times: dict[str, list[float]] = {n: [] for n in models}
        for turn in range(runs + 2):
            for name, model in models.items():
                spent = _forward(model, image, batch)
                if turn >= 2:  # the first two warm up
                    times[name].append(spent)
        rows.append({"batch": batch, **{n: 1e3 * statistics.median(t) for n, t in times.items()}})
    return rows


def _forward(model: nn.Module, image: Tensor, batch: int) -> float:
    device = next(model.parameters()).device
    x = image.to(device).expand(batch, *image.shape[1:]).contiguous()
    _wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        logits(model, x)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
