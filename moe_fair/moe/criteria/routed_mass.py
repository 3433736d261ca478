"""Routed output mass: Σ_t g_e·‖f_e‖₂; the removal score of `--method fair`.

REAP without its mean: what an expert adds to the layer's output over the whole calibration set, so
that a rarely used expert scores low however large its outputs are.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] Σ g‖f‖."""
    return view["gated_norm"]


criteria = (Criterion("routed-mass", ("gated_norm",), "this project", score),)
