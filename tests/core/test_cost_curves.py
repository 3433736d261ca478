"""Cost curves between their knots, the exact programme over them, and the second-order plan."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from moe_fair.core.allocate import allocators, curves, fisher
from moe_fair.core.cost_curves import attach, depths_to_measure, fill, isotonic, monotone_cubic
from moe_fair.core.cost_curves import curves as read_curves
from moe_fair.core.ranking import RankedGroup, rank
from moe_fair.core.units import Scores, Statistics, UnitGroup

CHECK = settings(max_examples=60, deadline=None, derandomize=True)


def make(
    seed: int, sizes: list[int], *, ties: bool = False, sequences: int = 5, **limits: int
) -> list[RankedGroup]:
    """Groups with random scores, rising random costs (of few values with `ties`), random rows."""
    rng = np.random.default_rng(seed)
    floor, blocks = limits.pop("floor", 1), limits.pop("blocks", 1)
    groups = tuple(UnitGroup(f"g{i}", i, n, floor, blocks=blocks) for i, n in enumerate(sizes))

    def steps(n: int) -> np.ndarray:
        return rng.integers(0, 2, n) if ties else rng.random(n)

    return rank(
        groups,
        Scores("u", {g.name: torch.tensor(rng.random(g.size)) for g in groups}),
        Scores("r", {g.name: torch.tensor(rng.random(g.size)) for g in groups}),
        costs={g.name: np.concatenate([[0.0], np.cumsum(steps(g.size))]) for g in groups},
        inputs={g.name: {"rows": rng.standard_normal((sequences, g.size))} for g in groups},
        **limits,
    )


def every_budget(ranked: list[RankedGroup], remove: int) -> list[tuple[int, ...]]:
    return [c for c in itertools.product(*(r.depths.tolist() for r in ranked)) if sum(c) == remove]


@CHECK
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=4),
    st.sampled_from([{}, {"floor": 3}, {"multiple_of": 2}, {"blocks": 2}, {"min_units": 2}]),
    st.booleans(),
    st.data(),
)
def test_the_programme_is_the_cheapest_of_all_budgets(
    seed: int, sizes: list[int], limits: dict[str, int], ties: bool, data: st.DataObject
) -> None:
    ranked = make(seed, sizes, ties=ties, **limits)
    remove = data.draw(st.sampled_from(sorted({sum(c) for c in itertools.product(
        *(r.depths.tolist() for r in ranked))})))  # fmt: skip
    kept = curves.allocate(ranked, remove=remove).kept
    got = tuple(r.group.size - kept[r.group.name] for r in ranked)

    def cost(depths: tuple[int, ...]) -> float:
        return sum(float(r.costs[m]) for r, m in zip(ranked, depths, strict=True))

    def uneven(depths: tuple[int, ...]) -> float:
        return sum(m * m / r.group.size for r, m in zip(ranked, depths, strict=True))

    budgets = every_budget(ranked, remove)
    assert got in budgets
    least = min(map(cost, budgets))
    assert cost(got) == pytest.approx(least, rel=1e-9, abs=1e-12)
    if ties:  # whole numbers, so that equal costs are equal
        tied = [b for b in budgets if cost(b) == least]
        assert uneven(got) == pytest.approx(min(map(uneven, tied)), rel=1e-5)


def test_flat_costs_give_the_uniform_budget() -> None:
    ranked = [replace(r, costs=np.zeros(r.group.size + 1)) for r in make(0, [12, 12, 24])]
    for remove in (8, 9, 23):
        even = allocators()["uniform"].allocate(ranked, remove=remove).kept
        flat = curves.allocate(ranked, remove=remove).kept
        if remove == 8:
            assert flat == even == {"g0": 10, "g1": 10, "g2": 20}
        shares = [flat[r.group.name] / r.group.size for r in ranked]
        assert max(shares) - min(shares) < 1 / 12 + 1e-12


def test_the_prediction_is_the_sum_of_the_curves() -> None:
    ranked = make(4, [10, 7, 12])
    budget = curves.allocate(ranked, remove=11)
    total = sum(float(r.costs[r.group.size - budget.kept[r.group.name]]) for r in ranked)
    assert budget.explanation["predicted_change"] == pytest.approx(total, rel=1e-12)


def test_steps_that_never_add_up_are_said() -> None:
    with pytest.raises(ValueError, match="try 10"):
        curves.cheapest([np.array([0, 4]), np.array([0, 6])], [np.zeros(2)] * 2, [8, 8], 9)


@CHECK
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_isotonic_is_scipys(values: list[float]) -> None:
    expected = isotonic_regression(values).x
    assert isotonic(np.array(values)) == pytest.approx(expected, abs=1e-12)


@CHECK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 10**6))
def test_interpolation_is_scipys_and_rises(steps: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.concatenate([[0], np.cumsum(rng.integers(1, 6, len(steps)))]).astype(float)
    y = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.linspace(0, x[-1], 101)
    got = monotone_cubic(x, y, at)
    assert got == pytest.approx(PchipInterpolator(x, y)(at), abs=1e-9)
    assert np.diff(got).min() >= -1e-12


def test_curves_pass_their_knots_and_go_on_beyond() -> None:
    costs = fill(np.array([2, 4, 6]), np.array([0.1, 0.3, 0.9]), 8)
    assert costs[[0, 2, 4, 6]] == pytest.approx([0, 0.1, 0.3, 0.9])
    assert costs[8] == pytest.approx(0.9 + 2 * 0.3)
    noisy = fill(np.array([2, 4, 6]), np.array([-0.1, 0.5, 0.3]), 6)
    assert noisy[[0, 2, 4, 6]] == pytest.approx([0, 0, 0.4, 0.4])
    assert fill(np.zeros(0), np.zeros(0), 3).tolist() == [0, 0, 0, 0]


def test_measured_depths_reach_the_floor_in_whole_blocks() -> None:
    assert depths_to_measure(UnitGroup("g", 0, 60, 4)) == [7, 14, 21, 28, 35, 42, 49, 56]
    assert depths_to_measure(UnitGroup("g", 0, 32, 8, blocks=4)) == [4, 8, 12, 16, 20, 24]
    assert depths_to_measure(UnitGroup("g", 0, 4, 4)) == []


def statistics(groups: tuple[UnitGroup, ...]) -> Statistics:
    none = torch.zeros(0, dtype=torch.int64)
    one = torch.ones(2, dtype=torch.float64)
    sums = {g.name: {"tokens": torch.ones(1, g.size, dtype=torch.float64)} for g in groups}
    return Statistics(groups, ("a",), sums, {}, {}, none, none, one[:1].clone(), one[1:].clone())


def test_curves_are_saved_with_the_statistics_and_belong_to_one_order(tmp_path: Path) -> None:
    groups = (UnitGroup("a", 0, 12, 4), UnitGroup("b", 1, 10, 2))
    changes = {
        g.name: torch.linspace(0.01, 1, len(depths_to_measure(g)), dtype=torch.float64)
        for g in groups
    }
    bare = statistics(groups)
    with pytest.raises(ValueError, match=r"hold no cost curves.*--curves reap"):
        read_curves(bare, "reap")
    attach(bare, changes, "reap", {"a": 2.0}, sequences=3).save(tmp_path)
    loaded = Statistics.load(tmp_path)
    found = read_curves(loaded, "reap", {"a": 2.0})
    assert found["a"] == pytest.approx(fill(np.arange(1, 9), changes["a"].numpy(), 12))
    assert loaded.metadata["curves"]["sequences"] == 3
    for removal, weights in (("ean", {"a": 2.0}), ("reap", None), ("reap", {"a": 1.0})):
        with pytest.raises(ValueError, match="hold the cost curves of reap with weights a=2"):
            read_curves(loaded, removal, weights)


def cost_of(ranked: list[RankedGroup], kept: dict[str, list[int]]) -> float:
    """½ mean (Σ rows)² from the definition."""
    total = 0.0
    left = [sorted(set(range(r.group.size)) - set(kept[r.group.name])) for r in ranked]
    gone = [r.inputs["rows"][:, ids] for r, ids in zip(ranked, left, strict=True)]
    for s in range(len(gone[0])):
        total += sum(float(x) for g in gone for x in g[s]) ** 2 / 2
    return total


def chosen(ranked: list[RankedGroup], remove: int) -> tuple[dict[str, list[int]], float]:
    budget = fisher.allocate(ranked, remove=remove)
    kept = {
        r.group.name: replace(r, removal_order=budget.orders[r.group.name]).kept(
            r.group.size - budget.kept[r.group.name]
        )
        for r in ranked
    }
    return kept, budget.explanation["objective"]


@pytest.mark.parametrize(
    "limits", [{}, {"floor": 4}, {"min_units": 5}, {"multiple_of": 4}, {"blocks": 2}], ids=str
)
def test_the_second_order_plan_says_its_own_objective(limits: dict[str, int]) -> None:
    ranked = make(3, [12, 8, 16], **limits)
    for remove in (8, 12, 20):
        kept, said = chosen(ranked, remove)
        assert sum(map(len, kept.values())) == 36 - remove
        assert said == pytest.approx(cost_of(ranked, kept), rel=1e-10)
        for r in ranked:
            assert r.group.size - len(kept[r.group.name]) in r.depths
            halves = [
                sum(i // (r.group.size // 2) == h for i in kept[r.group.name]) for h in (0, 1)
            ]
            assert r.group.blocks == 1 or halves[0] == halves[1]


@CHECK
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_greedy_takes_the_cheapest_next_unit(seed: int, remove: int) -> None:
    """From the definition: every unit that could leave next is tried, over all groups."""
    ranked = make(seed, [4, 5], sequences=3)
    kept = {r.group.name: list(range(r.group.size)) for r in ranked}
    for _ in range(remove):
        tries = [
            (cost_of(ranked, {**kept, name: [i for i in ids if i != unit]}), name, unit)
            for name, ids in kept.items()
            if len(ids) > 1
            for unit in ids
        ]
        _, name, unit = min(tries)
        kept[name].remove(unit)
    assert chosen(ranked, remove)[0] == kept


def test_greedy_is_near_the_best_of_all_sets() -> None:
    """Brute force over every set: never better than it, and near it on average."""
    ratios = []
    for seed in range(20):
        ranked = make(seed, [5, 5], sequences=6)
        ids = [(r.group.name, i) for r in ranked for i in range(5)]
        costs = []
        for gone in itertools.combinations(ids, 4):
            kept = {r.group.name: [i for i in range(5) if (r.group.name, i) not in gone]
                    for r in ranked}  # fmt: skip
            if all(kept.values()):
                costs.append(cost_of(ranked, kept))
        greedy = cost_of(ranked, chosen(ranked, 4)[0])
        assert greedy >= min(costs) - 1e-12
        ratios.append((greedy - min(costs)) / (np.mean(costs) - min(costs)))
    assert np.mean(ratios) < 0.15  # of the way to a random set


def test_units_that_cancel_leave_together() -> None:
    """What no score of single units can see: two rows of opposite sign, in two layers."""
    groups = (UnitGroup("a", 0, 2), UnitGroup("b", 1, 3))
    rows = {
        "a": np.array([[1.0, 9.0], [-1.0, 9.0]]),
        "b": np.array([[-3.0, 2.0, 9.0], [3.0, 2.0, 9.0]]),
    }
    scores = Scores("taylor-sq", {k: torch.tensor(v).square().mean(0) for k, v in rows.items()})
    ranked = rank(groups, scores, inputs={k: {"rows": v / 2**0.5} for k, v in rows.items()})
    assert chosen(ranked, 2) == ({"a": [1], "b": [1, 2]}, pytest.approx((1 - 3) ** 2 / 2))
    alone = allocators()["global"].allocate(ranked, remove=2)
    assert ranked[1].kept(3 - alone.kept["b"]) == [0, 2]
