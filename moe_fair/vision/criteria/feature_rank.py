"""Feature rank: the mean rank of the unit's H × W map over images (HRank, arXiv 2002.10179).

Summed over the places where the unit is read, after its activation. Where no map is left (after
global pooling, or in a token's hidden vector) the rank is 1 if the unit is on and 0 if not.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] as collected."""
    return view["feature_rank"]


criteria = (Criterion("hrank", ("feature_rank",), "arXiv 2002.10179", score),)
