"""The evolution of a budget: totals, bounds, the number of evaluations, and a known optimum."""

from __future__ import annotations

from itertools import product

import pytest

from moe_fair.core.evolution import Candidate, evolve

COST = (1.0, 4.0, 0.5, 2.0)  # of the square of what leaves each group
LEAST, MOST = (0, 0, 1, 0), (6, 6, 9, 6)


def fitness(c: Candidate) -> float:
    return -sum(w * d * d for w, d in zip(COST, c, strict=True))


def test_it_finds_the_optimum_of_a_small_space() -> None:
    space = [
        c
        for c in product(*(range(a, b + 1) for a, b in zip(LEAST, MOST, strict=True)))
        if sum(c) == 12
    ]
    optimum = max(space, key=fitness)
    found = evolve((3, 3, 3, 3), LEAST, MOST, fitness, evaluations=200)
    assert found.best == optimum
    assert found.fitness == fitness(optimum) > found.start == fitness((3, 3, 3, 3))


@pytest.mark.parametrize("steps", [1, 3])
def test_totals_bounds_and_evaluations(steps: int) -> None:
    seen: list[Candidate] = []

    def measured(c: Candidate) -> float:
        seen.append(c)
        return fitness(c)

    found = evolve((3, 3, 3, 3), LEAST, MOST, measured, evaluations=20, steps=steps)
    assert seen[0] == (3, 3, 3, 3)
    assert len(seen) == len(set(seen)) <= 20
    assert len(seen) == 20 or steps == 3
    for c in seen:
        assert sum(c) == 12
        assert all(a <= d <= b for a, d, b in zip(LEAST, c, MOST, strict=True))
        assert all(d % steps == 0 for d in c)
    assert list(found.history) == sorted(found.history)
    assert len(found.history) == len(seen)
    assert found.fitness == found.history[-1] == max(map(fitness, seen))
    again = evolve((3, 3, 3, 3), LEAST, MOST, fitness, evaluations=20, steps=steps)
    other = evolve((3, 3, 3, 3), LEAST, MOST, fitness, evaluations=20, steps=steps, seed=1)
    assert again == found != other


def test_where_nothing_can_move_it_ends() -> None:
    found = evolve((2, 2), (2, 0), (2, 2), fitness_of_two, evaluations=50)
    assert found.best == (2, 2)
    assert len(found.history) == 1


def fitness_of_two(c: Candidate) -> float:
    return float(-c[0])


def test_one_move_of_one_step_changes_two_groups() -> None:
    seen: list[Candidate] = []

    def measured(c: Candidate) -> float:
        seen.append(c)
        return fitness(c)

    evolve((3, 3, 3, 3), LEAST, MOST, measured, evaluations=9, moves=1, largest=1)
    assert len(seen) == 9
    for c in seen[1:]:  # all of them children of the start
        assert sorted(d - 3 for d in c) == [-1, 0, 0, 1]
