"""One factor per channel of the routed output, with a ridge toward the factor of the layer."""

from __future__ import annotations

from torch import Tensor

from moe_fair.moe.repairs.scale import factor
from moe_fair.moe.routed_output import RoutedOutput, read_down

name = "channel"
ridges = (0.0, 0.1)


def fit(routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
    """[E, F, D]; a_d = (⟨y_d, y'_d⟩ + λ a) / (⟨y'_d, y'_d⟩ + λ), λ the ridge times the mean square.

    A channel without output keeps the factor of the layer.
    """
    w = read_down(routed.experts)
    y = routed.output(w).double()
    a, square = factor(y, target), y.square().sum(0)
    weight = max(ridge * float(square.mean()), 1e-12 * float(square.mean()) + 1e-300)
    factors = ((y * target.double()).sum(0) + weight * a) / (square + weight)
    return w * factors.to(w.dtype)
