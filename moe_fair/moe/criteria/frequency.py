"""Frequency: n_e, the number of tokens routed to the expert. The common baseline."""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] routed tokens."""
    return view["tokens"]


criteria = (Criterion("frequency", ("tokens",), "common baseline", score),)
