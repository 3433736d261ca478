"""Layer-wise distillation: a pruned layer's MoE block trained toward the original layer's output.

    min over the block's weights   Σ_t ‖o(t) - o'(t)‖² / Σ_t ‖o(t) - r(t)‖²

with o the original layer's output in the original stream, o' the pruned layer's in the pruned
stream, r the residual stream that goes into it. Only the block's own weights take a gradient, and
it ends there: one layer's backward, never the model's. AdamW (arXiv 1711.05101) in float32 whatever
the weights' data type; the step is relative to each tensor's root mean square, so that one setting
serves models of any width. The epoch that is best on the held-out sequences is kept.

Shape legend: B sequences, L tokens, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_fair.engines.batch import Batch
from moe_fair.engines.streaming import LayerCall

STEP = 0.02  # of a tensor's root mean square, at the schedule's peak
WARM = 0.1  # share of the steps in which the rate rises; then it falls to zero along a cosine
BETAS = (0.9, 0.95)
CLIP = 1.0  # the gradient's largest norm, where the loss is 1 for a layer that does nothing
STEP_TOKENS = 1024  # about so many tokens to a step
PASSES = 2**20  # tokens that a layer is trained on, over all epochs
MOST_EPOCHS = 4  # more text is worth more than more epochs (eval/LAB.md)
COPIED_EPOCHS = 2  # over a text of which there are three copies or more


@dataclass(frozen=True)
class Distillation:
    """Held-out error relative to the layer's own change, before and after; the epoch kept."""

    before: float
    after: float
    epoch: int


def epochs_for(batches: Sequence[Batch]) -> int:
    """Epochs over these batches; copies of a sequence share its id."""
    ids = torch.cat([b.sequence_ids for b in batches])
    tokens = sum(int(b.mask.sum()) for b in batches)
    most = COPIED_EPOCHS if len(ids) > 3 * len(ids.unique()) else MOST_EPOCHS
    return min(most, max(1, PASSES // max(1, tokens)))


def distill_layer(
    layer: nn.Module,
    block: nn.Module,
    calls: Sequence[LayerCall],
    batches: Sequence[Batch],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    held: Callable[[Batch], Tensor],
    *,
    epochs: int,
    seed: int = 0,
) -> Distillation:
    """Train `block` inside `layer`, in place.

    Args:
        calls, batches: what the model hands to the layer with each batch.
        inputs, targets: [B, L, D] hidden states into the pruned layer, and wanted out of it.
        held: batch -> [B] which sequences judge instead of teach.

    Returns:
        what became of the held-out error. Nothing is changed where no epoch improves it.
    """
    names = {n: p for n, p in layer.named_parameters() if any(p is q for q in block.parameters())}
    masters = {n: p.detach().float().clone() for n, p in names.items()}
    # what runs: the masters, rounded to the weights' own type; gradients are of that type too
    cast = {n: p.detach().clone().requires_grad_(True) for n, p in names.items()}
    size = {n: float(m.square().mean().sqrt()) for n, m in masters.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [m], "lr": STEP * size[n]} for n, m in masters.items()],
        betas=BETAS,
        weight_decay=0.0,
        fused=True,  # one pass over the weights and their moments: memory traffic is what it costs
    )
    judges = [held(b) for b in batches]
    teach = [(b.mask.bool() & ~j.unsqueeze(1)) for b, j in zip(batches, judges, strict=True)]
    judge = [(b.mask.bool() & j.unsqueeze(1)) for b, j in zip(batches, judges, strict=True)]
    work = sum(float(_squares(t, x, m)) for t, x, m in zip(targets, inputs, teach, strict=True))
    unit = work / max(1, sum(int(m.sum()) for m in teach))

    def run(j: int) -> Tensor:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            return functional_call(layer, cast, arguments, keywords)

        return calls[j].run(forward, inputs[j])

    @torch.no_grad()
    def judged() -> float:
        error = size = 0.0
        for j, mask in enumerate(judge):
            if bool(mask.any()):
                error += float(_squares(targets[j], run(j), mask))
                size += float(_squares(targets[j], inputs[j], mask))
        return error / max(size, 1e-300)

    usable = [j for j, m in enumerate(teach) if bool(m.any())]
    order = torch.Generator().manual_seed(seed)
    steps = epochs * len(usable)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps))
    best = before = judged()
    kept, epoch = None, 0
    for number in range(1, epochs + 1):
        for i in torch.randperm(len(usable), generator=order).tolist():
            j = usable[i]
            with torch.enable_grad():
                loss = _squares(targets[j], run(j), teach[j]) / (int(teach[j].sum()) * unit)
                loss.backward()
            _step(optimizer, masters, cast)
            schedule.step()
        now = judged()
        if now < best:
            best, epoch = now, number
            kept = {n: m.detach().clone() for n, m in masters.items()}
    if kept is not None:
        for n, p in names.items():
            p.data.copy_(kept[n])
    return Distillation(before, best, epoch)


@torch.no_grad()
def _step(
    optimizer: torch.optim.Optimizer, masters: dict[str, Tensor], cast: dict[str, Tensor]
) -> None:
    """Move the masters along the gradients of what ran; both are of the same names."""
    ran = [p for p in cast.values() if p.grad is not None]
    nn.utils.clip_grad_norm_(ran, CLIP, foreach=True)
    for n, m in masters.items():
        grad = cast[n].grad
        m.grad = None if grad is None else grad.float()
        cast[n].grad = None
    optimizer.step()
    optimizer.zero_grad()
    torch._foreach_copy_(list(cast.values()), list(masters.values()))


def _squares(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Σ (a - b)² over the masked tokens of [B, L, D]: streams are far larger than what is between
    them, so they are subtracted in float32."""
    return ((a.float() - b.float()).square().sum(-1) * mask).sum()


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate."""
    rise = max(1, int(WARM * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
