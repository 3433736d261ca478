"""MoNE-type: how much an expert's output varies, times how much it is used (arXiv 2507.00390).

    S_e = (w · ‖√Var_t f_e(x_t)‖₂) · ((1 - w) · Σ_t g_e / T),    w = 1/2

The variance is per output channel over the routed tokens; T counts all tokens of the calibration
set. An expert whose output hardly varies can be replaced by its mean, the paper's "novice".
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView

WEIGHT = 0.5


def score(view: GroupView) -> Tensor:
    """[N] how much the output varies over tokens, times usage."""
    n = view["tokens"].clamp(min=1e-300).unsqueeze(1)
    mean = view["output"] / n
    variance = (view["output_sq"] / n - mean.square()).clamp(min=0)
    fluctuation = variance.sum(1).sqrt()
    usage = view["gate"] / view.total_tokens
    return (WEIGHT * fluctuation) * ((1 - WEIGHT) * usage)


criteria = (
    Criterion("mone", ("tokens", "gate", "output", "output_sq"), "arXiv 2507.00390", score),
)
