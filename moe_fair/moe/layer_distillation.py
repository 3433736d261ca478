"""Layer-wise distillation: a pruned layer's MoE block trained toward the original layer's output.

    min over the block's weights   Σ_t ‖o(t) - o'(t)‖² / Σ_t ‖o(t) - r(t)‖²

with o the original layer's output in the original stream, o' the pruned layer's in the pruned
stream, r the residual stream that goes into it. Only the block's own weights take a gradient, and
it ends there: one layer's backward, never the model's. AdamW (arXiv 1711.05101) in float32 whatever
the weights' data type; the step is relative to each tensor's root mean square, so that one setting
serves models of any width. The epoch that is best on the held-out sequences is kept.

While the rate still rises, the held-out sequences are asked whether the steps are too large, and
whether smaller ones gain anything: a fit that the text is too short to better is left as it is.

Shape legend: B sequences, L tokens, N tokens that are kept, D model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_fair.engines.batch import Batch
from moe_fair.engines.packing.experts import mean_square
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.layer_examples import Examples

STEP = 0.02  # of a tensor's root mean square, at the schedule's peak
RISE = 0.4  # of an epoch, in which the rate rises; then it falls to zero along a cosine
LOOK = 0.125  # of an epoch, after which the held-out error says whether to go on
# shares of the step that are tried, and the held-out error, relative to the first, below which one
# goes on: a large step may raise it at first and gain the more, a small one shows what there is
TRIED = ((1.0, 1.05), (0.25, 1.0))
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
    examples: Examples,
    block: MoeBlock,
    *,
    epochs: int,
    seed: int = 0,
    look: bool = True,
    part: tuple[int, int] = (0, 1),
) -> Distillation:
    """Train a block on the examples, in place.

    Args:
        look: whether anything is gained, and stop early where it is not.
        part: which of how many parts of the experts are trained, the others as they are: as many
            times less memory, and epochs. What is no expert's is trained with the first.

    Returns:
        what became of the held-out error. Nothing is changed where no epoch improves it.
    """
    epochs = max(1, epochs // part[1])
    before = 0.0
    for share, most in TRIED if look else ((1.0, math.inf),):
        training = _Training(examples, block, epochs, share, part)
        before = before or training.judged()
        found = _trained(training, before, most * before, epochs, seed)
        if found is not None:
            best, epoch, kept = found
            if epoch:
                training.write(kept)
            return Distillation(before, best, epoch)
        del training  # before the next one, of the same size
    return Distillation(before, before, 0)


def _trained(
    training: _Training, before: float, most: float, epochs: int, seed: int
) -> tuple[float, int, dict[str, Tensor]] | None:
    """The least held-out error, its epoch and its weights; None where the error is `most` or more
    after a small share of an epoch."""
    usable, order = training.examples.teaching, torch.Generator().manual_seed(seed)
    early, steps = max(1, round(LOOK * len(usable))), 0
    best, epoch, kept = before, 0, training.masters
    for number in range(1, epochs + 1):
        for i in torch.randperm(len(usable), generator=order).tolist():
            training.step(usable[i])
            steps += 1
            if steps == early and most < math.inf and not training.judged() < most:
                return None
        now = training.judged()
        if now < best:
            best, epoch = now, number
            kept = training.weights() if number < epochs else training.masters
    return best, epoch, kept


class _Training:
    """A block's weights in float32 with AdamW's moments, and what runs: the weights rounded.

    Attributes:
        names: name -> weight of the block.
        rows: name -> those of its rows that are trained; of all experts, or of a part of them.
        masters, cast: name -> these rows in float32, and as they run: gradients are of that type.
    """

    def __init__(
        self,
        examples: Examples,
        block: MoeBlock,
        epochs: int,
        share: float,
        part: tuple[int, int],
    ) -> None:
        self.examples = examples
        own = {id(p) for p in block.block.parameters()}
        self.names = {n: p for n, p in examples.module.named_parameters() if id(p) in own}
        self.rows = dict(self._rows(block, part))
        size = {n: float(mean_square(self.names[n]).sqrt()) for n in self.rows}
        self.masters = {n: self.names[n].detach()[r].float().clone() for n, r in self.rows.items()}
        self.cast = {
            n: self.names[n].detach()[r].clone().requires_grad_(True) for n, r in self.rows.items()
        }
        # one pass over the weights and their moments: memory traffic is what it costs
        self.optimizer = torch.optim.AdamW(
            [{"params": [m], "lr": share * STEP * size[n]} for n, m in self.masters.items()],
            betas=BETAS,
            weight_decay=0.0,
            fused=True,
        )
        each = len(examples.teaching)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: _rate(s, each, epochs)
        )
        self.unit = examples.unit

    def _rows(self, block: MoeBlock, part: tuple[int, int]) -> Iterator[tuple[str, slice]]:
        experts, (number, count) = {id(p) for p in block.experts.parameters()}, part
        for n, p in self.names.items():
            if id(p) in experts and count > 1:
                first, end = (len(p) * i // count for i in (number, number + 1))
                if end > first:
                    yield n, slice(first, end)
            elif not number:
                yield n, slice(None)

    def running(self) -> dict[str, Tensor]:
        """The block's weights with what is trained in its place."""
        found = {}
        for n, p in self.names.items():
            rows, now = self.rows.get(n), self.cast.get(n)
            if rows is None or now is None:
                found[n] = p.detach()
            elif rows.stop is None:
                found[n] = now
            else:
                found[n] = torch.cat([p.detach()[: rows.start], now, p.detach()[rows.stop :]])
        return found

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Put these rows into the block."""
        for n, rows in self.rows.items():
            self.names[n].data[rows].copy_(weights[n])

    def step(self, j: int) -> None:
        """Move the masters along the gradient of one batch's error."""
        with torch.enable_grad():
            error, tokens = self.examples.error(j, self.running(), judging=False)
            (error / (tokens * self.unit)).backward()
        with torch.no_grad():
            _step(self.optimizer, self.masters, self.cast)
        self.schedule.step()

    @torch.no_grad()
    def judged(self) -> float:
        """The error on what judges."""
        judging, weights = self.examples.judging, self.running()
        error = sum(self.examples.error(j, weights, judging=True)[0] for j in judging)
        return float(error) / max(self.examples.size, 1e-300)

    def weights(self) -> dict[str, Tensor]:
        """As they are now."""
        return {n: m.detach().clone() for n, m in self.masters.items()}


def _step(
    optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor], cast: Mapping[str, Tensor]
) -> None:
    """Move the masters along the gradients of what ran; both are of the same names."""
    ran = [p.grad for p in cast.values() if p.grad is not None]
    norm = nn.utils.get_total_norm(ran, foreach=True)
    # clipped while they are widened to float32, in one pass: a tensor of a dimension makes it so
    scale = (CLIP / (norm.float() + 1e-6)).clamp(max=1.0).view(1)
    for n, m in masters.items():
        grad = cast[n].grad
        m.grad = None if grad is None else grad * scale
        cast[n].grad = None
    optimizer.step()
    optimizer.zero_grad()
    torch._foreach_copy_(list(cast.values()), list(masters.values()))


def _rate(step: int, each: int, epochs: int) -> float:
    """Share of the peak rate, of epochs of so many steps."""
    rise, steps = max(1, round(RISE * each)), each * epochs
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
