"""How often and how strongly the router chooses each expert, with g the weight of a token's choice.

Common baselines of expert pruning: counts of routed tokens and router mass (SEER-type).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.statistic import Pass, Statistic

name = "routing"
collected = "always"
names = {
    "tokens": Statistic("E", "n: routed tokens"),
    "gate": Statistic("E", "Σ g"),
    "gate_sq": Statistic("E", "Σ g²"),
}


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[E] each."""
    g = seen.g
    return seen.per_expert({"tokens": torch.ones_like(g), "gate": g, "gate_sq": g.square()})
