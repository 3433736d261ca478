"""The loss with sets of experts removed from one layer at a time: only what comes after runs again.

The model walks forward a layer at a time over all batches. At each MoE layer the routed output
without every wanted set is known from one pass of the experts (`counterfactual`), and each of these
continues through the layers that follow. A loop over whole models with masked routers gives the
same numbers and takes nearly twice as long.

Shape legend: J batches, B sequences, L tokens, T = B·L, K top-k, R removals, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.engines.batch import Batch, Visit, quietly
from moe_fair.engines.layer_calls import LayerCall
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.rerouting import Candidates, Rerouting

# out + Δ stands for the layer run again where the two agree to this, relative to the output
ADDITIVE = 1e-5
# weights of a router that agree to this, relative to each, are the same but for rounding
SAME = 1e-6

Sets = Sequence[Sequence[int]]


class RemovalLosses:
    """Loss changes by removals within single layers.

    Args:
        model: the loaded model.
        batches: the text to measure on.
        visit: progress; called once per batch and layer.

    Raises:
        ValueError: the model has no plain list of decoder layers, or a router is not understood.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], visit: Visit = quietly) -> None:
        self.layered = LoadedLayers(model)
        self.engine = StreamingEngine(self.layered)
        self.visit = visit
        self.batches = [b.to(self.layered.device) for b in batches]
        self.blocks = {b.layer: b for b in find_blocks(model)}
        self.tokens = sum(int(b.mask[:, 1:].sum()) for b in self.batches)
        self.loss = float("nan")

    @torch.no_grad()
    def measure(self, sets: Mapping[str, Sets]) -> Iterator[tuple[str, Tensor]]:
        """For each MoE layer, in order, [J, R] float64 changes of each batch's summed loss in nats.

        Args:
            sets: group name -> the sets of experts to remove; layers that are not named are passed.
        """
        calls, hidden = self.engine.embed(self.batches)
        layers = self.layered.decoder.layers
        before = []
        for batch, row, end in zip(self.batches, calls, hidden, strict=True):
            for call, layer in zip(row, layers, strict=True):
                end = call.run(layer, end)
            before.append(self._loss(batch, end))
        self.loss = sum(before) / self.tokens
        for i, layer in enumerate(layers):
            block = self.blocks.get(i)
            wanted = sets.get(block.name) if block else None
            change = torch.zeros(len(self.batches), len(wanted or ()), dtype=torch.float64)
            for j, batch in enumerate(self.visit("removing", i, self.batches)):
                if block is None or not wanted:
                    hidden[j] = calls[j][i].run(layer, hidden[j])
                    continue
                out, variants = _without(layer, calls[j][i], block, hidden[j], batch, wanted)
                for r, variant in variants:
                    for call, later in zip(calls[j][i + 1 :], layers[i + 1 :], strict=True):
                        variant = call.run(later, variant)
                    change[j, r] = self._loss(batch, variant) - before[j]
                hidden[j] = out
            if block is not None and wanted:
                yield block.name, change

    def _loss(self, batch: Batch, last: Tensor) -> float:
        """Summed next-token loss."""
        parts = self.engine.losses_of(batch, last)
        return float(sum((losses.double() * weights).sum() for losses, weights in parts))


def _without(
    layer: nn.Module, call: LayerCall, block: MoeBlock, hidden: Tensor, batch: Batch, sets: Sets
) -> tuple[Tensor, Iterator[tuple[int, Tensor]]]:
    """The layer's output [B, L, D]; number and output of each set that changes it.

    Where every token keeps its experts and their weights nothing changes, here and in all later
    layers. That no token is routed to a set is not enough: without renormalisation of the top k
    its share of the softmax goes to the others.
    """
    tap, rerouting = BlockRecorder(block), Rerouting(block)
    rerouting.attach()
    try:
        with tap:
            out = call.run(layer, hidden)
        ids, weights = rerouting.routes(tap.index, tap.weights, sets)
    finally:
        rerouting.detach()
    real = batch.mask.flatten().bool()
    moved = ((weights - weights[:1]).abs() > SAME * weights[:1].abs()) | (ids != ids[:1])
    touched = moved[1:, real].flatten(1).any(1).nonzero().flatten().tolist()

    def again(r: int) -> Tensor:
        with tap.answering(ids[r + 1], weights[r + 1].to(tap.weights.dtype)):
            return call.run(layer, hidden)

    def variants() -> Iterator[tuple[int, Tensor]]:
        if not touched:
            return
        if tap.y.numel() != out.numel():  # the layer hands on more than one stream
            yield from ((r, again(r)) for r in touched)
            return
        first = again(touched[0])
        differences = _differences(tap, block, ids, weights, touched)
        quick = out + next(differences).view_as(out)
        near = float((quick - first).abs().max()) <= ADDITIVE * float(out.abs().max())
        yield touched[0], first
        for r in touched[1:]:
            yield r, out + next(differences).view_as(out) if near else again(r)

    return out, variants()


def _differences(
    tap: BlockRecorder, block: MoeBlock, ids: Tensor, weights: Tensor, wanted: Sequence[int]
) -> Iterator[Tensor]:
    """[T, D] change of the routed output for each wanted removal."""
    candidates = Candidates.of(tap.index, ids, weights, block.num_experts)
    flat = candidates.ids.flatten()
    real = (flat >= 0).nonzero().flatten()
    t, m = candidates.ids.shape
    tokens = real.div(m, rounding_mode="floor")
    weights_like = tap.weights.new_ones(len(real))
    rows = block.outputs(tap.stock, tap.x[tokens], flat[real], weights_like)
    f = rows.new_zeros(t * m, rows.shape[-1])
    f[real] = rows
    f = f.view(t, m, -1)
    for r in wanted:
        c = candidates.change[:, r].to(f.dtype)
        yield torch.bmm(c.unsqueeze(1), f).squeeze(1)
