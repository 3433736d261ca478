"""Global threshold: the lowest scores of the whole model leave, wherever they are (Molchanov 2019).

Raw scores are compared between groups as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_fair.core.allocate.climb import climb, feasible_total
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "global"
needs_protection = False


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """One threshold over all units, above every group's floor.

    Raises:
        ValueError: a tolerance instead of a total, or a total that cannot be met.
    """
    return by_threshold(name, ranked, [r.removal for r in ranked], remove)


def by_threshold(
    name: str, ranked: Sequence[RankedGroup], scores: Sequence[np.ndarray], remove: int | None
) -> Budget:
    """The climb in which a group's next step costs the mean score of the units that it removes."""
    if remove is None:
        raise ValueError(
            "a global threshold needs a budget; a tolerance alone is for --allocate tod"
        )
    feasible_total(ranked, remove)
    ordered = [s[r.removal_order] for s, r in zip(scores, ranked, strict=True)]

    def cost(g: int, i: int) -> tuple[float]:
        depths = ranked[g].depths
        return (float(ordered[g][depths[i - 1] : depths[i]].mean()),)

    index = climb(ranked, remove, cost)
    kept = {
        r.group.name: r.group.size - int(r.depths[i]) for r, i in zip(ranked, index, strict=True)
    }
    return Budget(kept, name)
