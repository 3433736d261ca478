"""The same sparsity in every layer."""

from __future__ import annotations

from moe_fair.core.units import Budget
from moe_fair.vision.sparse.fill import shares
from moe_fair.vision.sparse.layers import Net

name = "uniform"
needs_images = False


def allocate(net: Net, keep: int) -> Budget:
    """k_l ∝ size_l."""
    return Budget(shares(net.layers, {x.name: x.size for x in net.layers}, keep), name)
