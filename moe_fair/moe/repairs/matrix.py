"""A D × D matrix on the routed output: argmin ‖y - y'A‖² + λ‖A - aI‖².

See docs/methods.md, section 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.repairs.scale import factor
from moe_fair.moe.routed_output import RoutedOutput, read_down

name = "matrix"
ridges = (0.03, 0.3, 3.0)
wants_text = True


def fit(routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
    """[E, F, D] down projections times A; λ is the ridge times the mean diagonal of y'ᵀy'."""
    w = read_down(routed.experts)
    y = routed.output(w).double()
    gram, cross = y.T @ y, y.T @ target.double()
    weight = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(weight)
    cross.diagonal().add_(weight * factor(y, target))
    return w @ torch.linalg.solve(gram, cross).to(w.dtype)
