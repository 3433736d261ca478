"""U-Score: how differently a unit answers to two classes at most (FAIR-Pruner's removal score).

    U_j = Σ_consumers max_{a,b} W1(O_j | class a, O_j | class b)

with O_j the unit's output as the consumer reads it: a number, or a map of P positions, for which W1
is the mean over random directions of the one-dimensional distances (sliced Wasserstein).
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] as collected."""
    return view["u_score"]


criteria = (Criterion("u-score", ("u_score",), "FAIR-Pruner, arXiv 2508.02291", score),)
