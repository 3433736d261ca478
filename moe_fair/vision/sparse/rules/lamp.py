"""LAMP: w_u² / Σ_{v: |v| ≥ |w_u|} w_v² within its layer, then one threshold over all layers.

Lee et al., arXiv 2010.07611. The largest weight of each layer scores 1, so no layer is emptied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.core.units import Budget
from moe_fair.vision.sparse.fill import threshold
from moe_fair.vision.sparse.layers import Net

name = "lamp"
needs_images = False


def allocate(net: Net, keep: int) -> Budget:
    """The weights of highest LAMP score, counted per layer."""
    scores = {x.name: score(net.model.get_parameter(f"{x.name}.weight")) for x in net.layers}
    return Budget(threshold(net.layers, scores, keep), name)


def score(weight: Tensor) -> Tensor:
    """The LAMP score of every weight, in its shape, float64; 0 for a weight of zero."""
    squares = weight.detach().double().flatten().square()
    rising = squares.sort().values
    above = rising.flip(0).cumsum(0).flip(0)  # Σ of this and all later
    first = torch.searchsorted(rising, squares)  # equal magnitudes share their denominator
    return (squares / above[first].clamp(min=1e-300)).view(weight.shape)
