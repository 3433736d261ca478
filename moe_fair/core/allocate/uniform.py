"""Uniform allocation: the same share of every group; the ablation that papers report against."""

from __future__ import annotations

from collections.abc import Sequence

from moe_fair.core.allocate.climb import climb, feasible_total
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "uniform"
needs_protection = False


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """As even as the total allows: groups differ by one step at most, the earlier give more.

    Raises:
        ValueError: a tolerance instead of a total, or a total that cannot be met.
    """
    if remove is None:
        raise ValueError(
            "uniform allocation needs a budget; a tolerance alone is for --allocate tod"
        )
    feasible_total(ranked, remove)
    index = climb(ranked, remove, lambda g, i: (float(ranked[g].depths[i]) / ranked[g].group.size,))
    kept = {
        r.group.name: r.group.size - int(r.depths[i]) for r, i in zip(ranked, index, strict=True)
    }
    return Budget(kept, name)
