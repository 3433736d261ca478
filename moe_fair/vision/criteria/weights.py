"""Scores of the weights alone, summed over a unit's members.

l1, l2     Σ ‖w‖₁, Σ ‖w‖₂ over the filters that make the unit     Li et al., arXiv 1608.08710
bn-scale   Σ |γ| over its batch normalisations                    Liu et al., arXiv 1708.06519
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def l1(view: GroupView) -> Tensor:
    """[N] Σ ‖w‖₁."""
    return view["l1_norm"]


def l2(view: GroupView) -> Tensor:
    """[N] Σ ‖w‖₂."""
    return view["l2_norm"]


def scale(view: GroupView) -> Tensor:
    """[N] Σ |γ|."""
    return view["bn_scale"]


criteria = (
    Criterion("l1", ("l1_norm",), "arXiv 1608.08710", l1),
    Criterion("l2", ("l2_norm",), "arXiv 1608.08710", l2),
    Criterion("bn-scale", ("bn_scale",), "arXiv 1708.06519", scale),
)
