"""Totals where groups advance in different steps, against every combination of depths."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from moe_fair.core.allocate import allocators
from moe_fair.core.allocate.climb import climb, nearest_total, totals
from moe_fair.core.plan import ModelSize, Target, make_plan
from moe_fair.core.ranking import RankedGroup, rank
from moe_fair.core.units import Scores, UnitGroup

BEFORE = ModelSize(1000, 2000)
RULES = ["uniform", "global", "global-normalised", "curves", "fisher", "naee"]


def group(name: str, size: int, floor: int, multiple: int = 1) -> UnitGroup:
    return UnitGroup(name, 0, size, floor, 10, 20, multiple=multiple)


def scores(groups: tuple[UnitGroup, ...]) -> Scores:
    g = torch.Generator().manual_seed(0)
    return Scores("u", {x.name: torch.rand(x.size, generator=g).double() for x in groups})


def ranked(groups: tuple[UnitGroup, ...]) -> list[RankedGroup]:
    return rank(groups, scores(groups))


# steps of 4 in one group alone; of 3 and 2; of 6, 4 and 2; of 6 and 4 with one that cannot move
MIXED = [
    (group("a", 8, 8, 4), group("b", 16, 4, 4)),
    (group("a", 9, 3, 3), group("b", 8, 2, 2)),
    (group("a", 18, 6, 6), group("b", 12, 4, 4), group("c", 6, 2, 2)),
    (group("a", 18, 6, 6), group("b", 13, 4, 4), group("c", 5, 5)),
]


@pytest.mark.parametrize("groups", MIXED, ids=str)
def test_totals_are_all_sums_of_depths(groups: tuple[UnitGroup, ...]) -> None:
    found = ranked(groups)
    sums = sorted({sum(map(int, c)) for c in product(*(r.depths for r in found))})
    assert totals(found) == sums
    for share in np.linspace(0, sums[-1] / sum(g.size for g in groups), 40):
        wanted = share * sum(g.size for g in groups)
        best = min(abs(t - wanted) for t in sums)
        assert abs(nearest_total(found, float(share)) - wanted) == best
    for rate in (1, -1):  # large steps first, small steps first
        for total in sums:
            index = climb(found, total, lambda g, i, rate=rate: (rate * found[g].step, i))
            assert sum(int(r.depths[i]) for r, i in zip(found, index, strict=True)) == total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", MIXED, ids=str)
def test_a_size_is_met_with_the_most_units(groups: tuple[UnitGroup, ...], rule: str) -> None:
    """Also where the first group has one depth, or another step than the rest."""
    found, size = ranked(groups), sum(g.size for g in groups)
    data = {
        "costs": {g.name: np.arange(g.size + 1.0) for g in groups},
        "inputs": {g.name: {"rows": np.ones((2, g.size)), "gram": np.eye(g.size)} for g in groups},
    }
    assert rule in allocators()
    for removed in totals(found):
        for slack in (0, 9):  # less than a unit
            made = make_plan(
                groups, scores(groups), None, target=Target(parameters=1000 - 10 * removed + slack),
                allocator=rule, before=BEFORE, **data,
            )  # fmt: skip
            assert size - sum(len(g.kept) for g in made.groups) == removed
            assert made.after.parameters == 1000 - 10 * removed


def test_a_total_between_steps_says_its_neighbours() -> None:
    found = ranked(MIXED[3])  # 1, 5, 7, 9, 11, 13, 15, 17, 21 can leave
    from moe_fair.core.allocate.climb import feasible_total

    assert 3 not in totals(found)
    with pytest.raises(ValueError, match="in steps of 4 and 6: the nearest are 31 and 35"):
        feasible_total(found, 3)
