"""NAEE-style: the place of an expert in the order of `core.greedy`, over E.

Each time the expert leaves whose gated outputs, together with those that have left, change the
layer's output least. `--method naee` allocates by the rule of the same name, which chooses the sets
themselves; this score is what other allocators take of it. It says nothing across layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.greedy import greedy
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] place in the greedy order of `--allocate naee`; the first to leave has the lowest."""
    order, _ = greedy(view["gated_gram"].numpy(), view.group.blocks)
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return places / len(order)


criteria = (Criterion("naee", ("gated_gram",), "after arXiv 2402.14800", score),)
