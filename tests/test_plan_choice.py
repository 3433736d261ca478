"""`eval/plan_choice.py`: what judges take, and what it is worth."""

from __future__ import annotations

import itertools
import random
import sys

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "eval"))
import plan_choice


def row(**changes: list[float]) -> plan_choice.Row:
    n = len(next(iter(changes.values())))
    return {"model": "m", "ratio": 0.5, "seed": 0, "tokens": [2.0] * n, "changes": changes}


def test_by_every_way_to_draw_the_judges() -> None:
    """Two of five windows judge: the mean over all ten pairs, and what draws come to."""
    made = row(a=[1.0, 1.0, 1.0, 1.0, 9.0], b=[0.0, 3.0, 2.0, 3.0, 3.0])
    found = []
    for pair in itertools.combinations(range(5), 2):
        sums = {p: sum(made["changes"][p][i] for i in pair) for p in "ab"}
        taken = "a" if sums["a"] <= sums["b"] else "b"
        found.append(sum(x for i, x in enumerate(made["changes"][taken]) if i not in pair) / 6)
    exact = sum(found) / len(found)
    assert plan_choice.worth(made, ("a", "b"), 2, 20_000) == pytest.approx(exact, abs=0.01)


def test_more_judges_and_fewer_bad_plans_choose_better() -> None:
    draw = random.Random(0)
    good = [draw.gauss(1.0, 3.0) for _ in range(200)]
    bad = {f"p{i}": [x + draw.gauss(0.5, 3.0) for x in good] for i in range(9)}
    made = row(good=good, **bad)
    few, many = (plan_choice.worth(made, list(made["changes"])[:n], 15) for n in (2, 10))
    assert plan_choice.worth(made, ("good",), 15) < few < many
    assert plan_choice.worth(made, list(made["changes"]), 120) < many


def test_its_table() -> None:
    names = {n for s in plan_choice.SETS.values() for n in s} | {*plan_choice.PEERS}
    made = row(**{n: [float(i + 1)] * 70 for i, n in enumerate(sorted(names))})
    head, _, *lines = plan_choice.table([made])
    assert "m 50 %, 0" in head
    assert len(lines) == 3 * 3 + 5
    best = 1 + min(sorted(names).index(p) for p in plan_choice.PEERS)
    alone = next(line for line in lines if line.startswith("| fair alone"))
    assert f"| {(1 + sorted(names).index('fair')) / best:.2f} |" in alone
