"""Meeting a total exactly: one group after the other goes one allowed depth further."""

from __future__ import annotations

import heapq
from collections import Counter
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
    if not reaches(remove - least, steps_left(ranked)):
        possible = totals(ranked)
        below = max(t for t in possible if t < remove)
        above = min(t for t in possible if t > remove)
        steps = " and ".join(str(s) for s in sorted(steps_left(ranked)))
        raise ValueError(
            f"cannot keep exactly {size - remove} of {size} units in steps of {steps}: the nearest "
            f"are {size - above} and {size - below}"
        )


def totals(ranked: Sequence[RankedGroup]) -> list[int]:
    """Every number of units that can leave, rising."""
    least, most = (sum(int(r.depths[i]) for r in ranked) for i in (0, -1))
    room = steps_left(ranked)
    step = int(np.gcd.reduce(list(room))) if room else 1
    return [t for t in range(least, most + 1, step) if reaches(t - least, room)]


def nearest_total(ranked: Sequence[RankedGroup], share: float) -> int:
    """The number of units to remove that is nearest to a share of all and does not cut a step.

    A share that is beyond the range by more than half a step stays what it is, and cannot be met.
    """
    wanted = share * sum(r.group.size for r in ranked)
    possible = totals(ranked)
    if wanted - possible[-1] > min(steps_left(ranked), default=1) / 2:
        return round(wanted)
    return min(possible, key=lambda t: (abs(t - wanted), t))


def steps_left(ranked: Sequence[RankedGroup], at: Sequence[int] | None = None) -> Counter[int]:
    """Step -> how often some group can go one such step further, from the depths `at`."""
    at = at if at is not None else [0] * len(ranked)
    return +Counter[int]({
        s: sum(len(r.depths) - 1 - i for r, i in zip(ranked, at, strict=True) if r.step == s)
        for s in {r.step for r in ranked}
    })  # fmt: skip


def reaches(left: int, room: Counter[int]) -> bool:
    """Steps of these sizes, each so many times at most, can add up to `left`."""
    if left <= 0 or not room:
        return left == 0
    step = max(room)
    rest = Counter({s: n for s, n in room.items() if s != step})
    if not rest:
        return left % step == 0 and left // step <= room[step]
    return any(reaches(left - n * step, rest) for n in range(min(room[step], left // step), -1, -1))


def climb(
    ranked: Sequence[RankedGroup], remove: int, cost: Cost, start: Sequence[int] | None = None
) -> list[int]:
    """Indices into each group's `depths` whose depths add up to `remove`.

    Starting at `start` (default: each group's first depth), the group whose next depth costs least
    advances, ties by the order of the groups; a step after which the rest could not be met exactly
    is passed over.

    Raises:
        ValueError: the total cannot be met from there.
    """
    at = list(start) if start is not None else [0] * len(ranked)
    left = remove - sum(int(r.depths[i]) for r, i in zip(ranked, at, strict=True))
    assert left >= 0, "the start removes more than asked"
    room = steps_left(ranked, at)
    heap: list[tuple[tuple[float, ...], int]] = []
    for g, r in enumerate(ranked):
        if at[g] + 1 < len(r.depths):
            heapq.heappush(heap, (cost(g, at[g] + 1), g))
    while left and heap:
        _, g = heapq.heappop(heap)
        step = ranked[g].step
        # what cannot be taken now cannot be taken later either: the rest only becomes less
        if not reaches(left - step, room - Counter({step: 1})):
            continue
        at[g] += 1
        left -= step
        room = room - Counter({step: 1})
        if at[g] + 1 < len(ranked[g].depths):
            heapq.heappush(heap, (cost(g, at[g] + 1), g))
    if left:
        size = sum(r.group.size for r in ranked)
        raise ValueError(
            f"cannot keep exactly {size - remove} of {size} units: groups advance in different "
            f"steps and {left} units remain; try {size - remove + left}"
        )
    return at
