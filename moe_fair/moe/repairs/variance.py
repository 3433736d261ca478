"""Channelwise variance matching (arXiv 2605.25508), its scale shrunk toward 1.

See docs/methods.md, section 4.
Each channel of the routed output gets the variance that the target has. The published form also
matches the mean; experts without a bias have nowhere to put a shift, so only a bias takes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.routed_output import RoutedOutput, read_down

name = "variance"
ridges = (0.0, 0.5)


def fit(routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
    """[E, F, D]; a_d = (1 - s) σ_d / σ'_d + s, s = ridge / (1 + ridge)."""
    w = read_down(routed.experts)
    y = routed.output(w).double()
    wanted, have = target.double().std(0), y.std(0)
    scale = torch.where(have > 0, wanted / have.clamp(min=1e-300), torch.ones_like(have))
    shrunk = (scale + ridge) / (1 + ridge)
    return w * shrunk.to(w.dtype)
