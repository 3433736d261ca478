"""ToD whose ties are broken by measured cost curves instead of the removed share of the U-mass.

Where U and R agree, ToD is 0 up to about half of a group and the ties decide the whole budget: then
the group whose next depth has the least measured cost per unit goes further.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_fair.core.allocate.tod import by_tolerance
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "tod-curves"
needs_protection = True
needs_costs = True


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """Budget at a total number of removed units, or at a tolerance α; see `tod.allocate`.

    Raises:
        ValueError: as `tod.allocate`, or no costs.
    """
    if any(r.costs is None for r in ranked):
        raise ValueError("--allocate tod-curves needs measured cost curves and got none")
    return by_tolerance(name, ranked, remove, tolerance, _next_cost)


def _next_cost(r: RankedGroup) -> np.ndarray:
    """[N + 1] what the step that reaches each depth costs per unit."""
    assert r.costs is not None
    steps = np.full(len(r.costs), r.step)
    steps[r.depths[1:]] = np.diff(r.depths)
    before = r.costs[np.maximum(np.arange(len(r.costs)) - steps, 0)]
    return (r.costs - before) / steps
