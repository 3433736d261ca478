"""Meeting totals: what can be met, what is said where it cannot, and the order of the climb."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_fair.core.allocate import (
    allocators,
    curves,
    fisher,
    global_threshold,
    tod,
    tod_curves,
    uniform,
)
from moe_fair.core.allocate.climb import climb, feasible_total, nearest_total
from moe_fair.core.ranking import RankedGroup, block_order, depths, rank
from moe_fair.core.units import Scores, UnitGroup


def ranked(sizes: list[int], floor: int = 1, **limits: int) -> list[RankedGroup]:
    """Groups in whose removal order the ids rise."""
    multiple = limits.pop("multiple", 1)
    groups = tuple(UnitGroup(f"g{i}", i, n, floor, multiple=multiple) for i, n in enumerate(sizes))
    values = {g.name: torch.arange(g.size, dtype=torch.float64) for g in groups}
    return rank(groups, Scores("u", values), Scores("r", values), **limits)


def said(call: object, *arguments: object, **keywords: object) -> str:
    with pytest.raises(ValueError) as found:
        call(*arguments, **keywords)  # type: ignore[operator]
    return str(found.value)


def test_the_range_of_totals_is_said() -> None:
    groups = ranked([7, 5], floor=2)  # 0 to 8 can leave
    for remove in (0, 8):
        feasible_total(groups, remove)
    text = "of 12 units: floors and multiples allow 4 to 12"
    assert said(feasible_total, groups, 9) == f"cannot keep 3 {text}"
    assert said(feasible_total, groups, -1) == f"cannot keep 13 {text}"
    more = said(feasible_total, ranked([9, 7], floor=5), 7)
    assert more == "cannot keep 9 of 16 units: floors and multiples allow 10 to 16"
    uneven = ranked([7, 5], floor=2, multiple_of=2)  # 1 + 1 to 5 + 3 can leave
    text = "of 12 units: floors and multiples allow 4 to 10"
    assert said(feasible_total, uneven, 0) == f"cannot keep 12 {text}"


def test_the_nearest_totals_are_said() -> None:
    groups = ranked([9, 9], floor=3, multiple_of=3)  # 0, 3, 6 of each
    text = "units in steps of 3: the nearest are"
    assert said(feasible_total, groups, 4) == f"cannot keep exactly 14 of 18 {text} 12 and 15"
    assert said(feasible_total, groups, 8) == f"cannot keep exactly 10 of 18 {text} 9 and 12"
    feasible_total(groups, 9)
    odd = ranked([10, 10], floor=3, multiple_of=3)  # 1, 4, 7 of each
    assert said(feasible_total, odd, 4) == f"cannot keep exactly 16 of 20 {text} 15 and 18"
    assert said(feasible_total, odd, 12) == f"cannot keep exactly 8 of 20 {text} 6 and 9"
    feasible_total(odd, 11)
    # steps of 2 and 3 have 1 in common; groups with one depth have no step
    mixed = [*ranked([6], multiple_of=2), *ranked([6], multiple_of=3), *ranked([4], floor=4)]
    feasible_total(mixed, 5)
    alone = ranked([4, 4], floor=4)
    feasible_total(alone, 0)


def test_the_total_nearest_to_a_share() -> None:
    threes = ranked([9, 9], floor=3, multiple_of=3)  # totals 0, 3, ... 12
    assert [nearest_total(threes, q) for q in (0.0, 0.08, 0.09, 0.3, 0.5)] == [0, 0, 3, 6, 9]
    odd = ranked([10, 10], floor=3, multiple_of=3)  # totals 2, 5, ... 14
    assert [nearest_total(odd, q) for q in (0.0, 0.2, 0.3, 0.5)] == [2, 5, 5, 11]


def test_the_price_of_a_step_is_a_units() -> None:
    """Two units a step: what both cost together, halved; the first step from depth 0."""
    [pair] = ranked([6], multiple_of=2)
    pair = replace(pair, costs=np.array([0.0, 1.0, 5.0, 6.0, 12.0, 20.0, 30.0]))
    assert pair.step == 2
    assert tod_curves._next_cost(pair).tolist() == [0.0, 0.5, 2.5, 2.5, 3.5, 7.0, 9.0]


def test_the_cheapest_next_depth_goes_first() -> None:
    groups = ranked([4, 4, 4])
    order: list[tuple[int, int]] = []
    prices = {0: [0, 5, 1, 1], 1: [0, 2, 9, 9], 2: [0, 3, 3, 4]}

    def cost(g: int, i: int) -> tuple[float]:
        order.append((g, i))
        return (float(prices[g][i]),)

    assert climb(groups, 4, cost) == [0, 1, 3]
    # each depth is asked for once, when the one before it has been reached
    assert order == [(0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (2, 3)]
    assert climb(groups, 6, cost) == [2, 1, 3]
    assert climb(groups, 9, cost) == [3, 3, 3]
    assert climb(groups, 4, cost, [1, 1, 0]) == [3, 1, 0]
    assert climb(groups, 3, lambda g, i: (1.0,)) == [3, 0, 0]  # of equals the first group


def test_a_step_after_which_the_rest_cannot_be_met_is_passed_over() -> None:
    two, one = ranked([8], multiple_of=2)[0], ranked([8])[0]
    groups = [two, replace(one, group=replace(one.group, name="h"))]
    assert climb(groups, 3, lambda g, i: (float(g), float(i))) == [1, 1]
    threes = [*ranked([6], multiple_of=3), *ranked([6], multiple_of=2)]
    assert climb(threes, 4, lambda g, i: (float(g),)) == [0, 2]
    assert said(climb, threes, 4, lambda g, i: (float(g),), [1, 0]) == (
        "cannot keep exactly 8 of 12 units: groups advance in different steps and 1 units remain; "
        "try 9"
    )


def test_rules_without_their_data_say_so() -> None:
    groups = ranked([4, 4])
    ones = Scores("u", {r.group.name: torch.ones(4).double() for r in groups})
    bare = rank(tuple(r.group for r in groups), ones)
    assert "got no protection scores" in said(tod.allocate, bare, remove=1)
    assert "either a total or a tolerance" in said(tod.allocate, groups)
    assert "either a total or a tolerance" in said(tod.allocate, groups, remove=1, tolerance=0.1)
    assert "needs measured cost curves" in said(allocators()["tod-curves"].allocate, groups, 1)
    assert "needs measured cost curves" in said(curves.allocate, groups, 1)
    one = [replace(groups[0], costs=np.zeros(5)), groups[1]]
    assert "needs measured cost curves" in said(curves.allocate, one, 1)
    assert "needs measured cost curves" in said(allocators()["tod-curves"].allocate, one, 1)
    assert "got none" in said(fisher.allocate, groups, 1)
    for name in ("uniform", "global", "global-normalised", "naee", "curves", "fisher"):
        given = {"rows": np.zeros((1, 4)), "gram": np.eye(4)}
        full = [replace(r, costs=np.zeros(5), inputs=given) for r in groups]
        assert "--allocate tod" in said(allocators()[name].allocate, full, tolerance=0.2), name


def test_orders_of_blocks_and_ties() -> None:
    assert block_order(np.array([2.0, 1.0, 1.0, 0.0])).tolist() == [3, 1, 2, 0]
    # the lowest of either half first, then the second lowest
    assert block_order(np.array([5.0, 6.0, 1.0, 2.0]), 2).tolist() == [2, 0, 3, 1]


def test_depths_are_steps_from_the_fewest_to_the_floor() -> None:
    assert depths(UnitGroup("g", 0, 10, 3)).tolist() == list(range(8))
    assert depths(UnitGroup("g", 0, 10, 3), 5).tolist() == list(range(6))
    assert depths(UnitGroup("g", 0, 10, 3), 2).tolist() == list(range(8))
    assert depths(UnitGroup("g", 0, 10, 3), 0, 4).tolist() == [2, 6]
    assert depths(UnitGroup("g", 0, 12, 2, blocks=2, multiple=3), 0, 4).tolist() == [0]
    assert depths(UnitGroup("g", 0, 10, 10)).tolist() == [0]
    assert depths(UnitGroup("g", 0, 3, 0)).tolist() == [0, 1, 2, 3]
    assert said(depths, UnitGroup("g", 0, 10, 9), 0, 4) == (
        "g: no allowed number of units: at least 9 of 10 must stay, in a multiple of 4; lower "
        "--min-experts or --multiple-of"
    )
    assert "at least 9 of 10" in said(depths, UnitGroup("g", 0, 10, 1), 9, 4)


def test_the_share_of_mass_that_has_left() -> None:
    [r] = ranked([4])
    assert r.removed_mass().tolist() == [0, 0, 1 / 6, 3 / 6, 1]
    below = replace(r, removal=r.removal - 1)  # measured from the lowest, which is below zero
    assert below.removed_mass().tolist() == [0, 0, 1 / 6, 3 / 6, 1]
    above = replace(r, removal=r.removal + 1)
    assert above.removed_mass() == pytest.approx([0, 0.1, 0.3, 0.6, 1])
    equal = replace(r, removal=np.zeros(4))
    assert equal.removed_mass().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert r.step == 1
    assert ranked([9], multiple_of=3)[0].step == 3
    assert ranked([4], floor=4)[0].step == 1
    assert r.kept(0) == [0, 1, 2, 3]
    assert r.kept(3) == [3]


def test_a_block_of_units_costs_its_mean() -> None:
    """Two groups in steps of 2: what counts is the mean of the two that leave next."""
    a, b = ranked([4, 4], floor=2, multiple_of=2)
    a = replace(a, removal=np.array([0.0, 9.0, 9.0, 9.0]))
    b = replace(b, removal=np.array([4.0, 4.1, 9.0, 9.0]))
    assert global_threshold.allocate([a, b], remove=2).kept == {"g0": 4, "g1": 2}
    assert uniform.allocate([a, b], remove=2).kept == {"g0": 2, "g1": 4}


def test_explanations_of_tod() -> None:
    groups = ranked([6, 6])
    flip = replace(groups[1], protection_order=groups[1].protection_order[::-1].copy())
    given = tod.allocate([groups[0], flip], tolerance=0.5)
    assert given.explanation == {"tolerance": 0.5}
    met = tod.allocate([groups[0], flip], remove=4)
    assert met.allocator == "tod"
    total = sum(met.explanation["added_by_fill"].values())
    assert met.explanation["removed_at_tolerance_below"] + total == 4
    assert tod.ceiling(60, 0.05) == 30
    assert tod.ceiling(60, 1.0) == tod.ceiling(60, 2.0) == 60
    assert tod.ceiling(3, 0.5) == 2  # 3 / 1.5, whatever rounding says
    assert tod.null_depth(60, 0.25) == 15
    assert tod.null_depth(60, 1.5) == 60


def test_the_programme_says_the_nearest_total() -> None:
    depth = [np.array([0, 4]), np.array([0, 6])]
    assert said(curves.cheapest, depth, [np.zeros(2)] * 2, [8, 9], 9) == (
        "cannot keep exactly 8 of 17 units: groups advance in different steps; try 11"
    )
    assert curves.cheapest(depth, [np.zeros(2), np.array([0.0, 1.0])], [8, 9], 10) == [1, 1]
    assert curves.cheapest(depth, [np.zeros(2), np.zeros(2)], [8, 9], 0) == [0, 0]
    # costs are told apart to 2^-40 of the largest, negative ones too
    fine = [np.array([0.0, 1.0]), np.array([0.0, 1 - 2.0**-30])]
    steps = [np.array([0, 4]), np.array([0, 4])]
    assert curves.cheapest(steps, fine, [8, 8], 4) == [0, 1]
    assert curves.cheapest(steps, [-f for f in fine], [8, 8], 4) == [1, 0]
