"""AIMER: no data, only the spread of an expert's weights (arXiv 2603.18492).

    S_e = - mean|w| / rms(w)      over the expert's gate, up and down matrices

The paper prunes the experts with the HIGHER ratio first, hence the sign.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] −mean|w| / rms(w) over the expert's matrices; no data."""
    count = view["weight_count"]
    return -(view["weight_abs"] / count) / (view["weight_sq"] / count).sqrt().clamp(min=1e-300)


criteria = (
    Criterion("aimer", ("weight_abs", "weight_sq", "weight_count"), "arXiv 2603.18492", score),
)
