"""The loss without the experts that a plan removes, the others repaired, before anything is cut.

As in `moe.trial` every plan has its own stream, and all go through a layer while it is in memory.
At an MoE layer each plan's remaining experts get new down projections, fitted on text that teaches
as the repair `refit` fits them: toward the original layer's output in the original's stream. What
that changes is added to the layer's output, so no weight is written. The loss is measured on other
text, which taught no fit.

Shape legend: T tokens, K top-k, D model, P plans, N sequences that are judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from moe_fair.engines.batch import Batch
from moe_fair.engines.layer_calls import SEVERAL, LayerCall, NotLayerwise
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.layer_fit import precise
from moe_fair.moe.layer_split import uptake
from moe_fair.moe.repairs import refit
from moe_fair.moe.routed_output import RoutedOutput
from moe_fair.moe.trial import check_gone, gone_of, summed_losses, without_experts

RIDGE = 1.0  # the strongest of refit's: little text teaches
SWEEPS = 1


@torch.no_grad()
def repaired_losses(
    engine: StreamingEngine,
    teaching: Sequence[Batch],
    judging: Sequence[Batch],
    removed: Sequence[Mapping[str, Sequence[int]]],
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Summed next-token losses of every judged sequence, with nothing removed and with each plan.

    Args:
        engine: over the whole model.
        teaching: what the fits are made on.
        judging: what is measured on.
        removed: of each of P plans, block name -> ids that leave.
        keep: of the experts' hidden activations what is small, see `RoutedOutput`.

    Returns:
        losses [1 + P, N] in nats and predictions [N], float64, sequences in the batches' order.

    Raises:
        ValueError: a router chooses an expert that it should not see; experts that cannot be
            repaired; or the layers hand on more than one stream of hidden states.
    """
    layered = engine.layered
    text = _Text([*teaching, *judging], len(teaching), layered.device)
    blocks = {b.layer: b for b in find_blocks(engine.model)}
    calls, first = engine.embed(text.batches)
    if first[0].dim() != 3:
        raise NotLayerwise(SEVERAL.format(type(engine.model).__name__))
    streams: list[Sequence[Tensor]] = [first for _ in range(1 + len(removed))]
    depth = len(layered)
    for i in range(depth):
        block, came = blocks.get(i), list(streams)
        if block is not None and not any(block.name in plan for plan in removed):
            block = None  # it is never cut, and never repaired
        gone = [[], *(gone_of(plan, block) for plan in removed)]
        with layered.layer(i, i + 1 if i + 1 < depth else None) as layer:
            step = _Step(layer, block, [row[i] for row in calls], text, keep)
            streams[0] = step.original(came[0], engine.visit("trying", i, text.batches))
            for p in range(1, len(came)):
                q = next(q for q in range(p + 1) if came[q] is came[p] and gone[q] == gone[p])
                # so far no different from an earlier one
                streams[p] = streams[q] if q < p else step.repaired(came[p], gone[p])
    judged = text.batches[text.taught :]
    with layered.outside():
        losses = [
            torch.cat(
                [summed_losses(engine, b, x) for b, x in zip(judged, s[text.taught :], strict=True)]
            )
            for s in streams
        ]
    return torch.stack(losses), torch.cat([b.mask[:, 1:].sum(1).double().cpu() for b in judged])


class _Text:
    """Batches on a device, of which the first `taught` teach.

    Attributes:
        rows: of each batch the places of its tokens in [B·L]; None where none is padding. Found
            out on the host, once: a device would be waited for every time.
    """

    def __init__(self, batches: Sequence[Batch], taught: int, device: torch.device) -> None:
        self.taught = taught
        self.batches = [b.to(device) for b in batches]
        self.rows: list[Tensor | None] = []
        for b in batches:
            real = b.mask.flatten().bool()
            whole = bool(real.all())
            self.rows.append(None if whole else real.nonzero().squeeze(1).to(device))

    def tokens(self, x: Tensor, j: int) -> Tensor:
        """[N, ...] of [B·L, ...] of a batch, without padding."""
        rows = self.rows[j]
        return x if rows is None else x.index_select(0, rows)


class _Step:
    """One layer, through which every stream goes, the original's first.

    Args:
        block: its experts; None where it has none.
        calls: what the model hands to the layer with each batch.
    """

    def __init__(
        self,
        layer: nn.Module,
        block: MoeBlock | None,
        calls: Sequence[LayerCall],
        text: _Text,
        keep: bool,
    ) -> None:
        self.layer, self.block, self.calls = layer, block, calls
        self.text, self.keep = text, keep
        self.share: float | None = None  # see `uptake`
        self._out: list[Tensor] = []  # the original layer's output
        self._routed: list[Tensor] = []  # its routed output, where that is what is fitted to

    def original(self, stream: Sequence[Tensor], order: Iterable[Batch]) -> list[Tensor]:
        """The whole model's stream after the layer."""
        watch = None
        if self.block is not None:
            self.share = uptake(self.layer, self.block, self.calls[0], stream[0])
            watch = BlockRecorder(self.block) if self.share is None else None
        for j, _ in enumerate(order):
            with watch or nullcontext():
                self._out.append(self.calls[j].run(self.layer, stream[j]))
            if watch is not None:
                self._routed.append(watch.y)
        return self._out

    def repaired(self, stream: Sequence[Tensor], gone: list[int]) -> list[Tensor]:
        """A plan's stream after the layer without these experts, the others fitted."""
        if self.block is None:
            return [c.run(self.layer, x) for c, x in zip(self.calls, stream, strict=True)]
        outs, parts, routed = [], [], []
        chosen: list[Tensor] = []
        watch = BlockRecorder(self.block)
        for j, x in enumerate(stream):
            with without_experts(self.block, gone) as those, watch:
                outs.append(self.calls[j].run(self.layer, x))
            chosen += those
            kept = (watch.x, watch.index, watch.weights, self._wanted(j, outs[j], watch.y))
            parts.append([self.text.tokens(t, j) for t in kept])
            routed.append(watch.y)
        check_gone(self.block, gone, chosen)
        for j, fitted in enumerate(self._fitted(parts, gone)):
            change = fitted - self.text.tokens(routed[j], j)
            rows = self.text.rows[j]
            if rows is not None:
                every = torch.zeros_like(routed[j], dtype=change.dtype)
                change = every.index_copy_(0, rows, change)
            outs[j] = self._changed(j, stream[j], outs[j], change, gone)
        return outs

    def _wanted(self, j: int, out: Tensor, y: Tensor) -> Tensor:
        """[T, D] the routed output with which the layer would give what the original's gave."""
        if self.share is None:
            return precise(self._routed[j])
        # the difference of two streams is small beside them: not in their own type
        return (precise(self._out[j]) - precise(out)).flatten(0, -2) / self.share + y

    def _fitted(self, parts: Sequence[Sequence[Tensor]], gone: list[int]) -> Sequence[Tensor]:
        """[T, D] each batch's routed output with the down projections fitted to what teaches."""
        assert self.block is not None
        learn = sum(len(p[0]) for p in parts[: self.text.taught])
        x, ids, weights, target = (torch.cat(t) for t in zip(*parts, strict=True))
        routed = RoutedOutput(self.block.experts, x, ids, weights, keep=self.keep)
        teaching, _ = routed.split(learn)
        size = self.block.num_experts
        ridge = RIDGE * size / (size - len(gone))  # its mean is over those that left, too
        [(_, w)] = refit.path(teaching, target[:learn], [ridge], direct=0, sweeps=SWEEPS)
        return routed.output(w).split([len(p[0]) for p in parts])

    def _changed(self, j: int, x: Tensor, out: Tensor, change: Tensor, gone: list[int]) -> Tensor:
        """The layer's output with the routed output changed by this, [T, D]."""
        assert self.block is not None
        if self.share is not None:
            return out + (self.share * change).view_as(out).to(out.dtype)
        watch = BlockRecorder(self.block)
        with without_experts(self.block, gone), watch.adding(change.to(out.dtype)):
            return self.calls[j].run(self.layer, x)
