"""Erdős-Rényi-Kernel: density ∝ (C_out + C_in + k_h + k_w) / (C_out·C_in·k_h·k_w), at most 1.

Evci et al., arXiv 1911.11134; the form without a kernel is Mocanu et al., arXiv 1707.04780. What
layers that would pass 1 cannot take goes to the others, in the same proportion.
"""

from __future__ import annotations

from moe_fair.core.units import Budget
from moe_fair.vision.sparse.fill import shares
from moe_fair.vision.sparse.layers import Net

name = "erk"
needs_images = False


def allocate(net: Net, keep: int) -> Budget:
    """k_l ∝ density times size: the sum of the weight's dimensions."""
    return Budget(shares(net.layers, {x.name: sum(x.shape) for x in net.layers}, keep), name)
