"""Router mass: Σ_t g_e(x_t), the router weight that the expert received (SEER-type)."""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] Σ g."""
    return view["gate"]


criteria = (Criterion("router-mass", ("gate",), "SEER-type baseline", score),)
