"""How alike experts are, to the router and in what they add: REAM (arXiv 2604.04356).

With z_e the logit that the router's linear map gives to expert e.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.rerouting import RouterLogits
from moe_fair.moe.segments import vector_sums
from moe_fair.moe.statistic import Pass, Statistic

name = "similarity"
names = {
    "gated_output": Statistic("E D", "Σ g f"),
    "router_gram": Statistic("E E", "Σ z_e z_f over all tokens"),
}


def watch(block: MoeBlock) -> RouterLogits:
    """What the router thinks of every expert."""
    return RouterLogits(block)


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[E, D] and [E, E]."""
    gated = seen.f.to(seen.precise) * seen.g.to(seen.precise).unsqueeze(1)
    logits: Tensor = seen.watched[name].logits(len(seen.index)).double()
    if seen.counted is not None:
        logits = logits * seen.batch.mask.flatten().to(logits).unsqueeze(1)
    return {
        "gated_output": vector_sums(gated, seen.ids, seen.size, seen.counted)[0],
        "router_gram": logits.T @ logits,
    }
