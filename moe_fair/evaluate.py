"""What a model is worth: next-token loss on held-out text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moe_fair.engines.batch import Batch, token_losses


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean next-token negative log-likelihood in nats, over all tokens and per domain."""

    mean: float
    domains: dict[str, float]
    tokens: int


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module, batches: Iterable[Batch], domains: tuple[str, ...]
) -> HeldoutLoss:
    """Measure a model on held-out windows.

    Args:
        batches: of one domain each, see `CalibrationSet.batches`.
        domains: their names.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, len(domains), dtype=torch.float64)
    for batch in batches:
        batch = batch.to(device)
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask(), use_cache=False
        ).logits
        losses, weights = token_losses(logits, batch)
        total[0, batch.domain] += (losses * weights).double().sum().cpu()
        total[1, batch.domain] += weights.double().sum().cpu()
    loss, count = total
    per_domain = {d: float(loss[i] / count[i]) for i, d in enumerate(domains) if count[i]}
    return HeldoutLoss(float(loss.sum() / count.sum()), per_domain, int(count.sum()))
