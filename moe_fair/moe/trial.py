"""The loss without the experts that a plan removes, for several plans, before anything is cut.

Every plan has its own stream of hidden states, and all streams go through a layer while it is in
memory; so a model that is streamed is read once. The model's own routers run, on logits of minus
infinity for the experts that are gone (and the correction bias, where there is one).

Shape legend: B sequences, L tokens, P plans, N sequences over all batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from moe_fair.engines.batch import Batch
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.rerouting import Rerouting


@torch.no_grad()
def trial_losses(
    engine: StreamingEngine,
    batches: Sequence[Batch],
    removed: Sequence[Mapping[str, Sequence[int]]],
) -> tuple[Tensor, Tensor]:
    """Summed next-token losses of every sequence, with nothing removed and without each plan's.

    Args:
        engine: over the whole model.
        batches: what is measured on.
        removed: of each of P plans, block name -> ids that leave.

    Returns:
        losses [1 + P, N] in nats and predictions [N], float64, sequences in the batches' order.

    Raises:
        ValueError: a router chooses an expert that it should not see; or the layers hand on more
            than hidden states.
    """
    layered = engine.layered
    batches = [b.to(layered.device) for b in batches]
    blocks = {b.layer: b for b in find_blocks(engine.model)}
    calls, first = engine.embed(batches)
    streams = [list(first) for _ in range(1 + len(removed))]
    depth = len(layered)
    for i in range(depth):
        block = blocks.get(i)
        gone = [[], *(gone_of(plan, block) for plan in removed)]
        with layered.layer(i, i + 1 if i + 1 < depth else None) as layer:
            chosen: list[list[Tensor]] = [[] for _ in streams]
            for j, _ in enumerate(engine.visit("trying", i, batches)):
                came = [s[j] for s in streams]
                for p, stream in enumerate(streams):
                    q = next(q for q in range(p + 1) if came[q] is came[p] and gone[q] == gone[p])
                    if q < p:  # so far no different from an earlier one
                        stream[j] = streams[q][j]
                        continue
                    with without_experts(block, gone[p]) as those:
                        stream[j] = calls[j][i].run(layer, came[p])
                    chosen[p] += those
            for ids, those in zip(gone, chosen, strict=True):
                check_gone(block, ids, those)
    with layered.outside():
        losses = [
            torch.cat([summed_losses(engine, b, x) for b, x in zip(batches, s, strict=True)])
            for s in streams
        ]
    return torch.stack(losses), torch.cat([b.mask[:, 1:].sum(1).double().cpu() for b in batches])


def gone_of(plan: Mapping[str, Sequence[int]], block: MoeBlock | None) -> list[int]:
    """Ids of the block's experts that leave, in their order."""
    return sorted(plan.get(block.name, ())) if block is not None else []


def summed_losses(engine: StreamingEngine, batch: Batch, last: Tensor) -> Tensor:
    """[B] summed losses."""
    parts = engine.losses_of(batch, last)
    return sum(
        ((losses.double() * weights).sum(1).cpu() for losses, weights in parts),
        torch.zeros(len(batch.mask), dtype=torch.float64),
    )


@contextmanager
def without_experts(block: MoeBlock | None, gone: list[int]) -> Iterator[list[Tensor]]:
    """The block as if these experts were not there.

    Returns:
        what gets the [T, K] experts that the router chose, for `check_gone`.
    """
    chosen: list[Tensor] = []
    if block is None or not gone:
        yield chosen
        return
    watch = BlockRecorder(block)
    with ExitStack() as stack:
        stack.enter_context(watch)
        stack.enter_context(Rerouting(block).hiding(gone))
        yield chosen
    chosen.append(watch.index)


def check_gone(block: MoeBlock | None, gone: list[int], chosen: Sequence[Tensor]) -> None:
    """The router chose none of these experts; asked of a device once for all batches.

    Raises:
        ValueError: it did.
    """
    if block is None or not chosen:
        return
    found = torch.cat([index.flatten() for index in chosen]).unique()
    if not set(gone).isdisjoint(found.tolist()):
        raise ValueError(
            f"{block.name}: {type(block.router).__name__} chooses experts whose logits are -inf, "
            "so plans cannot be tried; use --rivals none"
        )
