"""ERK's densities times Relative Repairability: k_l ∝ RR_l · (C_out + C_in + k_h + k_w).

Ours. `rr` starts from equal densities, and so takes as large a share of a small layer as of a large
one; this starts from ERK's, which spare the small ones, and has the limits of `rr`.
"""

from __future__ import annotations

from moe_fair.core.units import Budget
from moe_fair.vision.sparse.layers import Net
from moe_fair.vision.sparse.rules.rr import by_repairability

name = "rr-erk"
needs_images = True


def allocate(net: Net, keep: int) -> Budget:
    """k_l ∝ RR_l times the sum of the weight's dimensions, within the limits of `rr`."""
    return by_repairability(name, net, keep, lambda x: sum(x.shape))
