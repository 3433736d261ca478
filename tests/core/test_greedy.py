"""Greedy removal by a Gram matrix against its definition, and the sets of `naee`."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from moe_fair.core.allocate import naee
from moe_fair.core.greedy import greedy
from moe_fair.core.ranking import rank
from moe_fair.core.units import Scores, UnitGroup


def gram(size: int, seed: int, width: int = 5) -> np.ndarray:
    v = np.random.default_rng(seed).normal(size=(width, size))
    return v.T @ v


def cost(g: np.ndarray, gone: list[int]) -> float:
    """F of a set, term by term."""
    return sum(float(g[e, f]) for e in gone for f in gone)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_each_step_adds_least(seed: int, blocks: int) -> None:
    g = gram(8, seed)
    order, added = greedy(g, blocks)
    assert sorted(order) == list(range(8))
    run = 8 // blocks
    for i, e in enumerate(order):
        gone = order[:i]
        counts = [sum(x // run == b for x in gone) for b in range(blocks)]
        free = [
            x for x in range(8) if x not in gone and counts[x // run] == min(counts)
        ]  # no run is ahead of another
        best = min(free, key=lambda x: cost(g, [*gone, x]))
        assert e == best
        assert added[i] == pytest.approx(cost(g, [*gone, e]) - cost(g, gone), abs=1e-9)


def test_of_equals_the_lowest_id_leaves() -> None:
    assert greedy(np.eye(4))[0] == [0, 1, 2, 3]
    assert greedy(np.eye(4), 2)[0] == [0, 2, 1, 3]


def groups(sizes: list[int], blocks: int = 1) -> tuple[UnitGroup, ...]:
    return tuple(UnitGroup(f"g{i}", i, n, 1, blocks=blocks) for i, n in enumerate(sizes))


def plan(grams: list[np.ndarray], remove: int, blocks: int = 1) -> tuple[list[list[int]], dict]:
    """Removed ids of every group, and the budget's explanation."""
    made = groups([len(g) for g in grams], blocks)
    zeros = Scores("naee", {g.name: torch.zeros(g.size, dtype=torch.float64) for g in made})
    ranked = rank(
        made, zeros, inputs={g.name: {"gram": m} for g, m in zip(made, grams, strict=True)}
    )
    budget = naee.allocate(ranked, remove=remove)
    gone = [sorted(budget.orders[g.name][: g.size - budget.kept[g.name]].tolist()) for g in made]
    for g in made:
        assert sorted(budget.orders[g.name].tolist()) == list(range(g.size))
    return gone, budget.explanation


def test_small_groups_lose_the_best_of_all_sets() -> None:
    grams = [gram(7, s) for s in (1, 2)]
    gone, said = plan(grams, 6)
    for g, ids, name in zip(grams, gone, ("g0", "g1"), strict=True):
        best = min(combinations(range(7), 3), key=lambda s: cost(g, list(s)))
        assert ids == list(best)
        assert said["search"][name] == "exhaustive"
        assert said["relative_error"][name] == pytest.approx(cost(g, ids) / g.sum(), rel=1e-9)


def test_of_equal_sets_the_first_leaves() -> None:
    assert naee.exhaustive(np.eye(5), 2) == [0, 1]
    assert naee.exhaustive(np.diag([3.0, 1.0, 2.0, 1.0]), 2) == [1, 3]


def test_large_or_blocked_groups_go_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    g = gram(8, 3)
    gone, said = plan([g], 4, blocks=2)
    assert gone == [sorted(greedy(g, 2)[0][:4])]
    assert said["search"] == {"g0": "greedy"}
    monkeypatch.setattr(naee, "MOST_SETS", 70)  # 8 choose 4
    assert plan([g], 4)[1]["search"] == {"g0": "exhaustive"}
    monkeypatch.setattr(naee, "MOST_SETS", 69)
    gone, said = plan([g], 4)
    assert gone == [sorted(greedy(g)[0][:4])]
    assert said["search"] == {"g0": "greedy"}


def test_outputs_of_nothing_have_no_error() -> None:
    assert plan([np.zeros((4, 4))], 2)[1]["relative_error"] == {"g0": 0.0}


def test_without_a_gram_matrix_it_says_what_is_missing() -> None:
    made = groups([4])
    zeros = Scores("naee", {"g0": torch.zeros(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        naee.allocate(rank(made, zeros), remove=1)
