"""ToD against a set-based implementation, its ceiling, totals and exact budgets.

See docs/methods.md, section 1.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_fair.core.allocate import allocators, tod
from moe_fair.core.ranking import RankedGroup, rank
from moe_fair.core.units import Scores, UnitGroup

CHECK = settings(max_examples=60, deadline=None, derandomize=True)


def make(seed: int, sizes: list[int], agree: float = 0.0, **limits: int) -> list[RankedGroup]:
    """Groups with random scores, costs and rows; `agree` mixes U into R."""
    rng = np.random.default_rng(seed)
    floor, blocks = limits.pop("floor", 1), limits.pop("blocks", 1)
    groups = tuple(UnitGroup(f"g{i}", i, n, floor, blocks=blocks) for i, n in enumerate(sizes))
    u = {g.name: rng.random(g.size) for g in groups}
    r = {g.name: agree * u[g.name] + (1 - agree) * rng.random(g.size) for g in groups}
    return rank(
        groups,
        Scores("u", {k: torch.tensor(v) for k, v in u.items()}),
        Scores("r", {k: torch.tensor(v) for k, v in r.items()}),
        costs={g.name: np.cumsum(rng.random(g.size + 1)) for g in groups},
        inputs={
            g.name: {
                "rows": rng.standard_normal((3, g.size)),
                "gram": (m := rng.standard_normal((9, g.size))).T @ m,
            }
            for g in groups
        },
        **limits,
    )


def naive_tod(r: RankedGroup, m: int) -> float:
    """|Remove(m) ∩ Protect(m)| / m from the definition, with sets."""
    units = range(r.group.size)
    assert r.protection is not None
    lowest = set(sorted(units, key=lambda i: (r.removal[i], i))[:m])
    highest = set(sorted(units, key=lambda i: (-r.protection[i], i))[:m])
    return len(lowest & highest) / m if m else 0.0


def naive_depth(r: RankedGroup, alpha: float) -> int:
    return max(int(m) for m in r.depths if naive_tod(r, int(m)) <= alpha)


def naive_budget(ranked: list[RankedGroup], remove: int) -> list[int]:
    """docs/methods.md, section 1: last step not above the budget, then the cheapest next depths."""
    steps = sorted({naive_tod(r, int(m)) for r in ranked for m in r.depths})
    start = [int(r.depths[0]) for r in ranked]
    for alpha in steps:
        at = [naive_depth(r, alpha) for r in ranked]
        if sum(at) <= remove:
            start = at
    while sum(start) < remove:
        costs = []
        for g, r in enumerate(ranked):
            if start[g] + 1 <= int(r.depths[-1]):
                ordered = sorted(r.removal)
                mass = sum(ordered[: start[g] + 1]) / sum(ordered)
                costs.append((naive_tod(r, start[g] + 1), round(mass, 12), g))
        start[min(costs)[2]] += 1
    return start


@CHECK
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.0, 0.5, 1.0]))
def test_curve_is_the_definition(seed: int, n: int, agree: float) -> None:
    [r] = make(seed, [n], agree)
    assert tod.curve(r) == pytest.approx([naive_tod(r, m) for m in range(n + 1)], abs=1e-12)


@CHECK
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0, 1))
def test_depth_is_the_largest_and_under_the_ceiling(seed: int, n: int, alpha: float) -> None:
    [r] = make(seed, [n])
    depth = n - tod.allocate([r], tolerance=alpha).kept["g0"]
    assert depth == naive_depth(r, alpha)
    assert depth <= min(tod.ceiling(n, alpha), n - 1)
    assert depth / n <= 1 / (2 - alpha) + 1e-12


def test_the_largest_depth_is_not_the_first_crossing() -> None:
    r = make(3, [12])[0]
    for seed in range(200):
        [r] = make(seed, [12])
        crossing = next(m for m in range(13) if naive_tod(r, m) > 0.3) - 1
        if crossing < naive_depth(r, 0.3):
            break
    else:
        pytest.fail("no example found")
    assert 12 - tod.allocate([r], tolerance=0.3).kept["g0"] == naive_depth(r, 0.3) > crossing


@CHECK
@given(st.integers(0, 10**6), st.lists(st.integers(4, 24), min_size=1, max_size=5))
def test_total_rises_with_tolerance(seed: int, sizes: list[int]) -> None:
    ranked = make(seed, sizes)
    totals = [sum(tod.allocate(ranked, tolerance=a).kept.values()) for a in np.linspace(0, 1, 23)]
    assert all(a >= b for a, b in itertools.pairwise(totals))


@CHECK
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.6, 1.0]), st.data())
def test_budget_is_the_rule_of_methods(seed: int, agree: float, data: st.DataObject) -> None:
    ranked = make(seed, [10, 7, 12], agree, floor=2)
    remove = data.draw(st.integers(0, 29 - 6))
    kept = tod.allocate(ranked, remove=remove).kept
    assert [r.group.size - kept[r.group.name] for r in ranked] == naive_budget(ranked, remove)


@pytest.mark.parametrize("name", sorted(allocators()))
@pytest.mark.parametrize(
    "limits", [{}, {"floor": 4}, {"min_units": 5}, {"multiple_of": 4}, {"blocks": 2}], ids=str
)
def test_every_feasible_total_is_met_exactly(name: str, limits: dict[str, int]) -> None:
    ranked = make(7, [12, 8, 16], **limits)
    allocate = allocators()[name].allocate
    reachable = {sum(c) for c in itertools.product(*(r.depths.tolist() for r in ranked))}
    for remove in range(37):
        if remove not in reachable:
            with pytest.raises(ValueError, match="cannot keep"):
                allocate(ranked, remove=remove)
            continue
        kept = allocate(ranked, remove=remove).kept
        assert sum(kept.values()) == 36 - remove
        for r in ranked:
            assert r.group.size - kept[r.group.name] in r.depths
            ids = r.kept(r.group.size - kept[r.group.name])
            halves = [sum(i // (r.group.size // 2) == h for i in ids) for h in (0, 1)]
            assert r.group.blocks == 1 or halves[0] == halves[1]


def test_uniform_and_global_do_what_they_say() -> None:
    ranked = make(1, [20, 20, 20])
    even = allocators()["uniform"].allocate(ranked, remove=17).kept.values()
    assert max(even) - min(even) <= 1
    kept = allocators()["global"].allocate(ranked, remove=17).kept
    lowest = sorted(x for r in ranked for x in r.removal)[:17]
    gone = sorted(r.removal[i] for r in ranked for i in r.removal_order[: 20 - kept[r.group.name]])
    assert gone == lowest


def test_scale_of_a_layer_has_no_say_when_normalised() -> None:
    ranked = make(2, [20, 20])
    louder = RankedGroup(
        ranked[0].group, ranked[0].removal * 1000, ranked[0].protection, ranked[0].removal_order,
        ranked[0].protection_order, ranked[0].depths,
    )  # fmt: skip
    normalised = allocators()["global-normalised"].allocate
    assert normalised(ranked, remove=9).kept == normalised([louder, ranked[1]], remove=9).kept
    raw = allocators()["global"].allocate([louder, ranked[1]], remove=9).kept
    assert raw == {"g0": 20, "g1": 11}


def test_null_depth_of_independent_rankings() -> None:
    """docs/methods.md, section 1: N = 60, α = .3, random ranks: 30.2 % with the largest depth."""
    depths = [60 - tod.allocate(make(s, [60]), tolerance=0.3).kept["g0"] for s in range(400)]
    assert np.mean(depths) / 60 == pytest.approx(0.302, abs=0.015)
    assert tod.null_depth(60, 0.3) == 18


def test_ties_fall_to_the_smaller_share_of_mass() -> None:
    """Where U and R agree ToD is 0 and the layer with a light tail gives more."""
    groups = (UnitGroup("flat", 0, 10), UnitGroup("skewed", 1, 10))
    values = {
        "flat": torch.full((10,), 5.0) + torch.arange(10) * 0.01,
        "skewed": torch.arange(10.0) ** 3 + 1,
    }
    scores = Scores("u", {k: v.double() for k, v in values.items()})
    budget = tod.allocate(rank(groups, scores, scores), remove=6)
    assert budget.kept["skewed"] < budget.kept["flat"]
    assert budget.explanation["tolerance_below"] is None


@pytest.mark.parametrize("remove", [9, 13, 23])
def test_what_the_fill_added_is_said(remove: int) -> None:
    ranked = make(2, [12, 8, 16])
    met = tod.allocate(ranked, remove=remove)
    said = met.explanation
    below = tod.allocate(ranked, tolerance=said["tolerance_below"]).kept
    above = tod.allocate(ranked, tolerance=said["tolerance_above"]).kept
    added = {g: n - met.kept[g] for g, n in below.items() if n > met.kept[g]}
    assert said["added_by_fill"] == added
    assert added
    assert said["removed_at_tolerance_below"] == 36 - sum(below.values()) <= remove
    assert 36 - sum(above.values()) > remove
