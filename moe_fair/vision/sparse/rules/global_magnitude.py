"""One threshold on |w| over all layers."""

from __future__ import annotations

from moe_fair.core.units import Budget
from moe_fair.vision.sparse.fill import threshold
from moe_fair.vision.sparse.layers import Net

name = "global"
needs_images = False


def allocate(net: Net, keep: int) -> Budget:
    """The largest weights of the model, counted per layer."""
    scores = {
        x.name: net.model.get_parameter(f"{x.name}.weight").detach().abs() for x in net.layers
    }
    return Budget(threshold(net.layers, scores, keep), name)
