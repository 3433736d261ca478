"""One factor per layer on the routed output: a = ⟨y, y'⟩ / ⟨y', y'⟩ (docs/methods.md, section 7).

With softmax over the remaining experts and no renormalisation over the top k every remaining weight
grows when experts leave; a factor takes most of that back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.routed_output import RoutedOutput, read_down

name = "scale"
ridges = (0.0,)


def fit(routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
    """[E, F, D] the present down projections times the factor."""
    w = read_down(routed.experts)
    return factor(routed.output(w), target) * w


def factor(y: Tensor, target: Tensor) -> float:
    """Least squares of a·y to the target, both [T, D]; 1 where y is zero."""
    size = float(y.square().sum(dtype=torch.float64))
    return float((y * target).sum(dtype=torch.float64)) / size if size > 0 else 1.0
