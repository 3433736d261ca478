"""Meeting a total exactly: one group after the other goes one allowed depth further."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from moe_fair.core.ranking import RankedGroup

# cost(group index, index of the next allowed depth) -> sort key; the lowest goes first
Cost = Callable[[int, int], tuple[float, ...]]


def feasible_total(ranked: Sequence[RankedGroup], remove: int) -> None:
    """Check that `remove` units can leave at all.

    Raises:
        ValueError: they cannot; says the range, or the nearest totals where multiples forbid it.
    """
    size = sum(r.group.size for r in ranked)
    least, most = (sum(int(r.depths[i]) for r in ranked) for i in (0, -1))
    if not least <= remove <= most:
        raise ValueError(
            f"cannot keep {size - remove} of {size} units: floors and multiples allow "
            f"{size - most} to {size - least}"
        )
    step = common_step(ranked)
    if (remove - least) % step:
        below = least + (remove - least) // step * step
        raise ValueError(
            f"cannot keep exactly {size - remove} of {size} units in steps of {step}: the nearest "
            f"are {size - below - step} and {size - below}"
        )


def common_step(ranked: Sequence[RankedGroup]) -> int:
    """Totals are the least possible one plus a multiple of this."""
    steps = {r.step for r in ranked if len(r.depths) > 1}
    return int(np.gcd.reduce(list(steps))) if steps else 1


def nearest_total(ranked: Sequence[RankedGroup], share: float) -> int:
    """The number of units to remove that is nearest to a share of all and does not cut a step."""
    wanted = share * sum(r.group.size for r in ranked)
    least, step = sum(int(r.depths[0]) for r in ranked), common_step(ranked)
    return least + max(0, round((wanted - least) / step)) * step


def climb(
    ranked: Sequence[RankedGroup], remove: int, cost: Cost, start: Sequence[int] | None = None
) -> list[int]:
    """Indices into each group's `depths` whose depths add up to `remove`.

    Starting at `start` (default: each group's first depth), the group whose next depth costs least
    advances, ties by the order of the groups; a step that would overshoot is passed over.

    Raises:
        ValueError: the total cannot be met from there.
    """
    at = list(start) if start is not None else [0] * len(ranked)
    left = remove - sum(int(r.depths[i]) for r, i in zip(ranked, at, strict=True))
    assert left >= 0, "the start removes more than asked"
    heap: list[tuple[tuple[float, ...], int]] = []
    for g, r in enumerate(ranked):
        if at[g] + 1 < len(r.depths):
            heapq.heappush(heap, (cost(g, at[g] + 1), g))
    while left and heap:
        _, g = heapq.heappop(heap)
        if ranked[g].step > left:
            continue
        at[g] += 1
        left -= ranked[g].step
        if at[g] + 1 < len(ranked[g].depths):
            heapq.heappush(heap, (cost(g, at[g] + 1), g))
    if left:
        size = sum(r.group.size for r in ranked)
        raise ValueError(
            f"cannot keep exactly {size - remove} of {size} units: groups advance in different "
            f"steps and {left} units remain; try {size - remove + left}"
        )
    return at
