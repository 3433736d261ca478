"""Measured cost curves: the budget whose added-up cost is least, found exactly.

    minimise Σ_g cost_g(m_g)   over allowed depths m_g with Σ_g m_g = the number to remove

by dynamic programming over the groups, for any total and any set of depths. Costs are compared in
whole steps of 2⁻⁴⁰ of the largest, so that equal ones are equal; among the cheapest budgets the one
nearest to uniform wins (least Σ m_g²/N_g), then the one in which earlier groups give more.

The sum takes the groups' losses as if each were cut alone: how far that is from the loss of the
whole cut is what the plan's `predicted_change` can be held against.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_fair.core.allocate.climb import feasible_total
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "curves"
needs_protection = False
needs_costs = True

LEVELS = 2.0**40


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """The cheapest budget for a total.

    Raises:
        ValueError: no costs, a tolerance instead of a total, or a total that cannot be met.
    """
    if any(r.costs is None for r in ranked):
        raise ValueError("--allocate curves needs measured cost curves and got none")
    if remove is None:
        raise ValueError("cost curves need a budget; a tolerance alone is for --allocate tod")
    feasible_total(ranked, remove)
    costs = [r.costs[r.depths] for r in ranked if r.costs is not None]
    index = cheapest([r.depths for r in ranked], costs, [r.group.size for r in ranked], remove)
    return Budget(
        {r.group.name: r.group.size - int(r.depths[i]) for r, i in zip(ranked, index, strict=True)},
        name,
        {
            "predicted_change": sum(float(c[i]) for c, i in zip(costs, index, strict=True)),
            "predicted_change_of": {
                r.group.name: float(c[i]) for r, c, i in zip(ranked, costs, index, strict=True)
            },
        },
    )


def cheapest(
    depths: Sequence[np.ndarray], costs: Sequence[np.ndarray], sizes: Sequence[int], total: int
) -> list[int]:
    """Indices into each group's depths (and costs there) that add up to the total most cheaply.

    Raises:
        ValueError: no choice of depths adds up to it.
    """
    largest = max(float(np.abs(c).max()) for c in costs)
    unit = largest / LEVELS if largest > 0 else 1.0
    never = np.iinfo(np.int64).max // 2
    best = np.full(total + 1, never)  # cost of the groups so far at each number removed
    bent = np.zeros(total + 1, dtype=np.int64)  # their distance from uniform
    best[0] = 0
    choices = []
    for depth, cost, size in zip(depths, costs, sizes, strict=True):
        new, new_bent = np.full(total + 1, never), np.zeros(total + 1, dtype=np.int64)
        choice = np.zeros(total + 1, dtype=np.int64)
        steps = np.rint(cost / unit).astype(np.int64)
        uneven = np.rint(depth.astype(np.float64) ** 2 / size * 2**20).astype(np.int64)
        for j, m in enumerate(depth.tolist()):
            if m > total:
                break
            reached = best[: total + 1 - m] < never
            c = np.where(reached, best[: total + 1 - m] + steps[j], never)
            b = bent[: total + 1 - m] + uneven[j]
            better = (c < new[m:]) | (reached & (c == new[m:]) & (b < new_bent[m:]))
            new[m:][better], new_bent[m:][better] = c[better], b[better]
            choice[m:][better] = j
        best, bent = new, new_bent
        choices.append(choice)
    if best[total] >= never:
        near = np.flatnonzero(best < never)
        whole = sum(sizes)
        raise ValueError(
            f"cannot keep exactly {whole - total} of {whole} units: groups advance in different "
            f"steps; try {whole - int(near[-1])}"
        )
    index = []
    for depth, choice in zip(reversed(depths), reversed(choices), strict=True):
        index.append(int(choice[total]))
        total -= int(depth[index[-1]])
    return index[::-1]
