"""How far a pruned model agrees with the original, token by token, without any benchmark.

At every predicted position of held-out text, with p the original's next-token distribution and q
the pruned model's:

    KL(p ‖ q) = Σ_v p(v) log(p(v) / q(v))          in nats
    top-1     = [argmax p = argmax q]
    acceptance = Σ_v min(p(v), q(v))               = 1 - total variation distance

Acceptance is the probability that speculative sampling keeps a token which one of the two models
drafts for the other (the ESAP of EvoESAP). All three are 0, 1, 1 for identical models.

Shape legend: B sequences of a batch, L tokens, V vocabulary, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fair.engines.batch import Batch, Engine
from moe_fair.engines.processes import ALONE, Team

# sums per domain: positions, original loss, pruned loss, KL, top-1, acceptance
_SUMS = 6
ROWS = 2**24  # elements of one chunk of positions in float64


@dataclass(frozen=True)
class Agreement:
    """Means over the predicted positions.

    Attributes:
        tokens: number of positions.
        original_loss, pruned_loss: next-token loss in nats.
        kl: KL(original ‖ pruned) in nats.
        top1: share of positions where both rank the same token first.
        acceptance: expected speculative acceptance, Σ min(p, q).
    """

    tokens: int
    original_loss: float
    pruned_loss: float
    kl: float
    top1: float
    acceptance: float


@dataclass(frozen=True)
class Agreements:
    """Agreement over all positions, and per domain."""

    mean: Agreement
    domains: dict[str, Agreement]


def agreement(
    original: Engine,
    pruned: Engine,
    batches: Sequence[Batch],
    domains: tuple[str, ...],
    team: Team = ALONE,
) -> Agreements:
    """Run both models over the same batches, position by position beside each other.

    Args:
        original, pruned: engines of two models with one vocabulary.
        batches: of one domain each, small enough for their logits; see `CalibrationSet.batches`.
        domains: their names.
        team: the processes that do this together: each runs its share of the batches.

    Raises:
        ValueError: the vocabularies differ.
    """
    numbers = team.share(range(len(batches)), lambda i: float(batches[i].mask.numel()))
    own = [batches[i] for i in numbers]
    found: dict[int, Tensor] = {}
    pairs = zip(original.logits(own), pruned.logits(own), strict=True)
    for i, batch, (p, q) in zip(numbers, own, pairs, strict=True):
        if p.shape != q.shape:
            raise ValueError(
                f"the models predict {p.shape[-1]} and {q.shape[-1]} tokens; agreement needs one "
                "vocabulary: give the model that this one was pruned from"
            )
        counts = batch.mask[:, 1:].bool()
        targets = batch.input_ids[:, 1:][counts]
        where = counts.to(p.device)
        found[i] = _sums(p[:, :-1][where], q[:, :-1][where], targets.to(p.device))
    for part in team.gather(found):
        found |= part
    sums = torch.zeros(len(domains), _SUMS, dtype=torch.float64)
    for i, batch in enumerate(batches):  # in one order, whoever measured
        sums[batch.domain] += found[i]
    measured = {d: _means(s) for d, s in zip(domains, sums, strict=True) if s[0]}
    return Agreements(_means(sums.sum(0)), measured)


def _sums(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """The six sums over positions, from logits [P, V] of both and targets [P]; float64."""
    total = torch.zeros(_SUMS, dtype=torch.float64)
    step = max(1, ROWS // p.shape[-1])
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        log_p, log_q = (x[rows].double().log_softmax(-1) for x in (p, q.to(p.device)))
        true = targets[rows, None]
        total += torch.stack(
            [
                torch.tensor(float(len(true)), dtype=torch.float64, device=p.device),
                -log_p.gather(1, true).sum(),
                -log_q.gather(1, true).sum(),
                torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True),
                (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
                torch.minimum(log_p, log_q).exp().sum(),
            ]
        ).cpu()
    return total


def _means(sums: Tensor) -> Agreement:
    count = int(sums[0])
    return Agreement(count, *(sums[1:] / count).tolist())
