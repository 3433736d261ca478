"""Top-1 accuracy and latency of an image classifier."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_fair.vision.data import ImageSet
from moe_fair.vision.graph import logits
from moe_fair.vision.portions import portion

LARGEST = 8  # batch
GUESSED = (
    "the dense model is no better than guessing on these images: are its classes in their order, "
    "and --mean, --std and --image-size those that it was trained with?"
)
SECONDS = 1.5  # for each batch size
FEWEST, MOST = 6, 50  # turns; the extremes of six hold a median with 97 %


def top1(model: nn.Module, images: ImageSet, batch_size: int) -> float:
    """Share of the images whose highest output is the label, 0 to 1."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for read, labels in images.batches(batch_size):
            size = portion(read, batch_size, device)
            for x, y in zip(read.split(size), labels.split(size), strict=True):
                right += (logits(model, x.to(device)).argmax(-1) == y.to(device)).sum()
    model.train(training)
    return int(right) / len(images)


def guessed(share: float, images: ImageSet) -> bool:
    """A top-1 that always naming the largest class of these images would reach as well.

    Args:
        share: right answers, 0 to 1.
    """
    largest = float(images.labels.bincount().max()) / len(images)
    error = math.sqrt(largest * (1 - largest) / len(images))
    return share <= largest + 2 * error


def latency(
    models: Mapping[str, nn.Module],
    image: Tensor,
    seconds: float = SECONDS,
) -> list[dict[str, float]]:
    """Milliseconds of one forward of one image and of several, the models taking turns.

    Several are 8, or 4 or 2 where six turns of more would take longer than `seconds`; a model for
    which two would is timed with one image alone.

    Args:
        models: `dense` and `pruned`, on one device.
        image: [1, C, H, W].
        seconds: after which a batch size has had its time; six turns it has in any case.

    Returns:
        a row for each batch size: `batch`, medians `dense` and `pruned` in milliseconds, `faster`,
        the median over the turns of how many times as fast `pruned` is, and `low` and `high`, what
        this median is between with 95 %, whatever the times are distributed like.
    """
    one = _race(models, image, 1, seconds)
    turn = sum(one[n] for n in models) / 1e3
    batch = LARGEST
    while batch > 1 and (FEWEST + 1) * batch * turn > seconds:
        batch //= 2
    return [one, _race(models, image, batch, seconds)] if batch > 1 else [one]


def _race(
    models: Mapping[str, nn.Module], image: Tensor, batch: int, seconds: float
) -> dict[str, float]:
    times: dict[str, list[float]] = {n: [] for n in models}
    for model in models.values():  # to warm up
        _forward(model, image, batch)
    started = time.perf_counter()
    while len(times["pruned"]) < FEWEST or (
        len(times["pruned"]) < MOST and time.perf_counter() - started < seconds
    ):
        for name, model in models.items():
            times[name].append(_forward(model, image, batch))
    ratios = [d / p for d, p in zip(times["dense"], times["pruned"], strict=True)]
    low, high = between(ratios)
    return {
        "batch": batch,
        **{n: 1e3 * statistics.median(t) for n, t in times.items()},
        "faster": statistics.median(ratios), "low": low, "high": high,
    }  # fmt: skip


def between(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median with 95 %: how many values lie below is binomial.

    Args:
        values: six or more.
    """
    ordered = sorted(values)
    count = len(ordered)
    outside, below = 0, 0  # ways in which the median lies under the value after `below`
    while 2 * (outside + math.comb(count, below)) <= 0.05 * 2**count:
        outside += math.comb(count, below)
        below += 1
    return ordered[below - 1], ordered[count - below]


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
