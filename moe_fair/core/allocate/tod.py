"""Tolerance of Difference: the allocation rule of FAIR-Pruner (arXiv 2508.02291).

In a group of N units, with Remove(m) the m units of lowest removal score U and Protect(m) the m
units of highest protection score R,

    ToD(m) = |Remove(m) ∩ Protect(m)| / m,      ToD(0) = 0,

and the depth at tolerance α is the LARGEST allowed m with ToD(m) <= α, not the first crossing. By
counting, ToD(m) >= (2m - N)/m, hence m/N <= 1/(2 - α): the ceiling. Two independent rankings give
a depth of about α·N: the null depth.

A budget is met exactly: the largest α whose total does not exceed it, then the groups whose next
depth has the least ToD go further, ties by the removed share of the group's U-mass, then by order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from moe_fair.core.allocate.climb import climb, feasible_total, meets
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "tod"
needs_protection = True


def curve(ranked: RankedGroup) -> np.ndarray:
    """[N + 1] ToD at every depth 0..N.

    A unit is in both sets at depth m exactly if its later place in the two orders is below m.
    """
    n = ranked.group.size
    assert ranked.protection_order is not None
    place = np.empty((2, n), dtype=np.int64)
    place[0, ranked.removal_order] = np.arange(n)
    place[1, ranked.protection_order] = np.arange(n)
    overlap = np.cumsum(np.bincount(place.max(axis=0), minlength=n))
    return np.concatenate([[0.0], overlap / np.arange(1, n + 1)])


def ceiling(size: int, tolerance: float) -> int:
    """Largest depth that any pair of rankings reaches at this tolerance: ⌊N / (2 - α)⌋."""
    return math.floor(size / (2.0 - tolerance) + 1e-9) if tolerance < 1 else size


def null_depth(size: int, tolerance: float) -> float:
    """Depth that two independent rankings reach on average, about α·N."""
    return min(tolerance, 1.0) * size


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """Budget at a total number of removed units, or at a tolerance α.

    Raises:
        ValueError: no protection scores, not exactly one of the two targets, or a total that the
            floors and multiples do not allow.
    """
    return by_tolerance(name, ranked, remove, tolerance, RankedGroup.removed_mass)


def by_tolerance(
    name: str,
    ranked: Sequence[RankedGroup],
    remove: int | None,
    tolerance: float | None,
    ties: Callable[[RankedGroup], np.ndarray],
) -> Budget:
    """ToD, where equal ones are told apart by `ties` of the next depth ([N + 1], low goes on)."""
    if any(r.protection_order is None for r in ranked):
        raise ValueError("ToD compares two rankings and got no protection scores")
    if (remove is None) == (tolerance is None):
        raise ValueError("ToD takes either a total or a tolerance")
    curves = [curve(r) for r in ranked]
    # smallest ToD at this depth or deeper: the largest depth within α is a binary search away
    reach = [
        np.minimum.accumulate(c[r.depths][::-1])[::-1] for c, r in zip(curves, ranked, strict=True)
    ]

    def at(alpha: float) -> list[int]:
        found = (int(np.searchsorted(s, alpha, side="right")) - 1 for s in reach)
        return [max(i, 0) for i in found]

    def total(index: list[int]) -> int:
        return sum(int(r.depths[i]) for r, i in zip(ranked, index, strict=True))

    if remove is None:
        assert tolerance is not None
        index = at(tolerance)
        return _budget(name, ranked, index, {"tolerance": tolerance})

    feasible_total(ranked, remove)
    alphas = np.unique(np.concatenate(reach))
    low, high = -1, len(alphas)  # total(alphas[low]) <= remove < total(alphas[high])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(at(alphas[middle])) <= remove else (low, middle)
    # between steps of different sizes the rest may be out of reach from there
    while low >= 0 and not meets(ranked, remove, at(alphas[low])):
        low -= 1
    start = at(alphas[low]) if low >= 0 else [0] * len(ranked)
    tie = [ties(r) for r in ranked]

    def cost(g: int, i: int) -> tuple[float, float]:
        depth = int(ranked[g].depths[i])
        return float(curves[g][depth]), float(tie[g][depth])

    index = climb(ranked, remove, cost, start)
    added = {
        r.group.name: int(r.depths[i] - r.depths[s])
        for r, i, s in zip(ranked, index, start, strict=True)
        if i > s
    }
    return _budget(
        name,
        ranked,
        index,
        {
            # None: already the smallest step removes more, so the ties decide all of the budget
            "tolerance_below": float(alphas[low]) if low >= 0 else None,
            "tolerance_above": float(alphas[high]) if high < len(alphas) else None,
            "removed_at_tolerance_below": total(start),
            "added_by_fill": added,
        },
    )


def _budget(
    name: str, ranked: Sequence[RankedGroup], index: list[int], explanation: dict
) -> Budget:
    kept = {
        r.group.name: r.group.size - int(r.depths[i]) for r, i in zip(ranked, index, strict=True)
    }
    return Budget(kept, name, explanation)
