"""Meeting a total exactly: one group after the other goes one allowed depth further."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

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
    if not meets(ranked, remove):
        possible = totals(ranked)
        below = max(t for t in possible if t < remove)
        above = min(t for t in possible if t > remove)
        steps = " and ".join(str(s) for s in sorted(steps_left(ranked)))
        how = f"steps of {steps}" if _even(ranked) else "the counts that are allowed"
        raise ValueError(
            f"cannot keep exactly {size - remove} of {size} units in {how}: the nearest are "
            f"{size - above} and {size - below}"
        )


def meets(ranked: Sequence[RankedGroup], remove: int, at: Sequence[int] | None = None) -> bool:
    """From the depths `at`, by default the first, exactly `remove` units can leave."""
    at = at if at is not None else [0] * len(ranked)
    left = remove - sum(int(r.depths[i]) for r, i in zip(ranked, at, strict=True))
    if _even(ranked):
        return reaches(left, steps_left(ranked, at))
    return left >= 0 and bool(_sums(ranked, at) >> left & 1)


def totals(ranked: Sequence[RankedGroup]) -> list[int]:
    """Every number of units that can leave, rising."""
    least, most = (sum(int(r.depths[i]) for r in ranked) for i in (0, -1))
    if not _even(ranked):
        found = _sums(ranked, [0] * len(ranked))
        return [least + t for t in range(most - least + 1) if found >> t & 1]
    room = steps_left(ranked)
    step = int(np.gcd.reduce(list(room))) if room else 1
    return [t for t in range(least, most + 1, step) if reaches(t - least, room)]


def nearest_total(ranked: Sequence[RankedGroup], share: float) -> int:
    """The number of units to remove that is nearest to a share of all and does not cut a step.

    A share that is beyond the range by more than half a step stays what it is, and cannot be met.
    """
    wanted = share * sum(r.group.size for r in ranked)
    possible = totals(ranked)
    last = (int(r.depths[-1] - r.depths[-2]) for r in ranked if len(r.depths) > 1)
    if wanted - possible[-1] > min(last, default=1) / 2:
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


class Room:
    """How far each group has gone, what is left to remove, and which next depths still let the
    total be met.

    Attributes:
        at: of each group the index of its depth.
        remove, left: units that leave in all, and that still have to.
    """

    def __init__(
        self, ranked: Sequence[RankedGroup], remove: int, start: Sequence[int] | None = None
    ) -> None:
        self.ranked, self.at = ranked, list(start) if start is not None else [0] * len(ranked)
        self.remove = remove
        self.left = remove - sum(int(r.depths[i]) for r, i in zip(ranked, self.at, strict=True))
        self._even, self._steps = _even(ranked), steps_left(ranked, self.at)

    def step(self, g: int) -> int:
        """Units between a group's depth and its next; 0 where there is none."""
        depths, i = self.ranked[g].depths, self.at[g]
        return int(depths[i + 1] - depths[i]) if i + 1 < len(depths) else 0

    def allows(self, g: int) -> bool:
        """After a group's next depth the rest can still be met exactly."""
        step = self.step(g)
        if not step or step > self.left:
            return False
        if self._even:
            return reaches(self.left - step, self._steps - Counter({step: 1}))
        then = [i + (h == g) for h, i in enumerate(self.at)]
        return meets(self.ranked, self.remove, then)

    def take(self, g: int) -> None:
        """Go to a group's next depth."""
        step = self.step(g)
        self._steps = self._steps - Counter({step: 1})
        self.left -= step
        self.at[g] += 1


def _even(ranked: Sequence[RankedGroup]) -> bool:
    return all(r.even for r in ranked)


def _sums(ranked: Sequence[RankedGroup], at: Sequence[int]) -> int:
    """Bit t is set where t more units can leave from the depths `at`."""
    found = 1
    for r, i in zip(ranked, at, strict=True):
        gaps = (r.depths[i:] - r.depths[i]).tolist()
        found = reduce(or_, (found << gap for gap in gaps))
    return found


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
    room = Room(ranked, remove, start)
    assert room.left >= 0, "the start removes more than asked"
    heap: list[tuple[tuple[float, ...], int]] = []
    for g in range(len(ranked)):
        if room.step(g):
            heapq.heappush(heap, (cost(g, room.at[g] + 1), g))
    while room.left and heap:
        _, g = heapq.heappop(heap)
        # what cannot be taken now cannot be taken later either: the rest only becomes less
        if not room.allows(g):
            continue
        room.take(g)
        if room.step(g):
            heapq.heappush(heap, (cost(g, room.at[g] + 1), g))
    if left := room.left:
        size = sum(r.group.size for r in ranked)
        raise ValueError(
            f"cannot keep exactly {size - remove} of {size} units: groups advance in different "
            f"steps and {left} units remain; try {size - remove + left}"
        )
    return room.at
