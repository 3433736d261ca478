"""Next-token loss of a model on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_fair.engines.batch import Batch, Losses


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean next-token negative log-likelihood in nats, over all tokens and per domain."""

    mean: float
    domains: dict[str, float]
    tokens: int


def heldout_loss(engine: Losses, batches: Sequence[Batch], domains: tuple[str, ...]) -> HeldoutLoss:
    """Measure a model on held-out windows.

    Args:
        engine: runs the model.
        batches: of one domain each, see `CalibrationSet.batches`.
        domains: their names.
    """
    total = torch.zeros(2, len(domains), dtype=torch.float64)
    for batch, (losses, weights) in zip(batches, engine.losses(batches), strict=True):
        total[0, batch.domain] += (losses * weights).double().sum().cpu()
        total[1, batch.domain] += weights.double().sum().cpu()
    loss, count = total
    per_domain = {d: float(loss[i] / count[i]) for i, d in enumerate(domains) if count[i]}
    return HeldoutLoss(float(loss.sum() / count.sum()), per_domain, int(count.sum()))
