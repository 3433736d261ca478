"""The global second-order plan: units of all groups chosen together by their Taylor rows.

With r_i(s) the Taylor value of unit i in calibration sequence s (what switching it off changes in
the sequence's loss, to first order), the empirical Fisher in place of the Hessian gives the cost of
a set S of units anywhere in the model

    F(S) = ½ mean_s (Σ_{i∈S} r_i(s))²

cross terms between layers included. Greedy: the unit that adds least to F leaves, its terms with
all others are added to what they would cost, and so on. Where a group must advance by several units
at once (multiples, blocks), its next units are chosen the same way and compared by their mean.

It chooses the units themselves, so the budget brings its own removal orders.

Shape legend: S sequences, N units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_fair.core.allocate.climb import Room, feasible_total
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget, GroupView

name = "fisher"
needs_protection = False
# [S, N] Taylor values per sequence, scaled so that sums of products are (weighted) means
inputs = {"rows": GroupView.scaled_rows}
needs = ("rows",)
removal = "taylor-sq"  # 2 F of a single unit: the one removal score that goes with it


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """Greedy choice of a total; ties go to the earlier group and the lower id.

    Raises:
        ValueError: no rows, a tolerance instead of a total, or a total that cannot be met.
    """
    if any("rows" not in r.inputs for r in ranked):
        raise ValueError("--allocate fisher needs per-sequence Taylor rows and got none")
    if remove is None:
        raise ValueError("fisher needs a budget; a tolerance alone is for --allocate tod")
    feasible_total(ranked, remove)
    groups = [_Group(r) for r in ranked]
    total = np.zeros(len(groups[0].rows))  # [S] Σ of the removed units' rows
    for g in groups:
        if count := int(g.ranked.depths[0]):
            total = g.take(g.next(total, count)[1], total)
    room = Room(ranked, remove)
    while room.left:
        offers = [(*g.next(total, room.step(i)), i) for i, g in enumerate(groups) if room.allows(i)]
        _, units, chosen = min(offers, key=lambda o: o[0] / len(o[1]))
        total = groups[chosen].take(units, total)
        room.take(chosen)
    return Budget(
        {g.ranked.group.name: g.ranked.group.size - len(g.removed) for g in groups},
        name,
        {"objective": float(total @ total) / 2},
        {g.ranked.group.name: g.order() for g in groups},
    )


class _Group:
    """What has left one group, and what its next units would add to F."""

    def __init__(self, ranked: RankedGroup) -> None:
        self.ranked, self.rows = ranked, ranked.inputs["rows"]
        self.own = np.square(self.rows).sum(0) / 2  # [N] F of each unit alone
        self.run = ranked.group.size // ranked.group.blocks
        self.removed: list[int] = []

    def next(self, total: np.ndarray, count: int) -> tuple[float, list[int]]:
        """What the next `count` units add to F, and which they are; an equal share per block."""
        cost = self.own + self.rows.T @ total
        cost[self.removed] = np.inf
        added, units = 0.0, list[int]()
        quota = np.full(self.ranked.group.blocks, count // self.ranked.group.blocks)
        while len(units) < count:
            unit = int(np.argmin(np.where(np.repeat(quota, self.run) > 0, cost, np.inf)))
            added += float(cost[unit])
            units.append(unit)
            quota[unit // self.run] -= 1
            if len(units) < count:
                cost += self.rows.T @ self.rows[:, unit]
                cost[unit] = np.inf
        return added, units

    def take(self, units: list[int], total: np.ndarray) -> np.ndarray:
        """Remove them; the new total."""
        self.removed += units
        return total + self.rows[:, units].sum(1)

    def order(self) -> np.ndarray:
        """[N] the removed in the order in which they left, then the others as scored."""
        rest = [i for i in self.ranked.removal_order.tolist() if i not in set(self.removed)]
        return np.array(self.removed + rest)
