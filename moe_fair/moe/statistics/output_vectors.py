"""Each expert's outputs f as vectors: their sum and that of their squares, so mean and variance.

Used by MoNE (arXiv 2507.00390) and HC-SMoE (arXiv 2410.08589). E × D numbers a layer and domain.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.moe.segments import vector_sums
from moe_fair.moe.statistic import Pass, Statistic

name = "output_vectors"
collected = "usual"
names = {
    "output": Statistic("E D", "Σ f"),
    "output_sq": Statistic("E D", "Σ f², entry by entry"),
}


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[E, D] each."""
    total = vector_sums(seen.f, seen.ids, seen.size, seen.counted)
    return {"output": total[0], "output_sq": total[1]}
