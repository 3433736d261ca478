"""EASY-EP type: output mass, each token weighted by how far the layer turns it (its public code).

    S_e = Σ_t g_e ‖f_e‖₂ · (1 - cos(x_t, x_t + y_t))

x is the experts' input and y = Σ_e g_e f_e the routed output of the layer.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] Σ g‖f‖ (1 - cos(x, x + y)): output mass, tokens weighted by how far they turn."""
    return view["turned_norm"]


criteria = (Criterion("easy-ep", ("turned_norm",), "EASY-EP's public code", score),)
