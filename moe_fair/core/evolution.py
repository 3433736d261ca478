"""Evolution of a budget: experts move between layers, the whole stays as it is.

A candidate is a number of removed units per group. Each generation the best `parents` of all that
were measured have `population` children; a child is a parent after one to `moves` transfers, each
of up to `largest` steps from one group to another. Nothing is measured twice.

After EvoESAP (arXiv 2603.06003), which searches over layer budgets at fixed removal orders and a
fixed total; population, parents, moves and their size are those of its public code's example (32,
4, 3, 4; 50 generations there). The budget here is a number of evaluations.

Shape legend: a candidate has one whole number per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Candidate = tuple[int, ...]
ATTEMPTS = 32  # at a child that is new


@dataclass(frozen=True)
class Found:
    """The best candidate, its fitness, that of the start, and the best after every evaluation."""

    best: Candidate
    fitness: float
    start: float
    history: tuple[float, ...]


def evolve(
    start: Sequence[int],
    least: Sequence[int],
    most: Sequence[int],
    fitness: Callable[[Candidate], float],
    *,
    evaluations: int,
    steps: int = 1,
    population: int = 32,
    parents: int = 4,
    moves: int = 3,
    largest: int = 4,
    seed: int = 0,
) -> Found:
    """The fittest candidate of `evaluations` measured; fewer where no new one is found.

    Args:
        start: measured first.
        least, most: bounds of every group.
        fitness: higher is better; ties go to the earlier candidate.
        steps: units that move at once, or a multiple of it.
    """
    generator = np.random.default_rng(seed)
    first = tuple(int(d) for d in start)
    known = {first: fitness(first)}
    history = [known[first]]
    while len(known) < evaluations:
        best = sorted(known, key=lambda c: -known[c])[:parents]
        before = len(known)
        for _ in range(min(population, evaluations - before)):
            for _ in range(ATTEMPTS):
                parent = best[int(generator.integers(len(best)))]
                child = _mutate(parent, least, most, steps, moves, largest, generator)
                if child not in known:
                    known[child] = fitness(child)
                    history.append(max(history[-1], known[child]))
                    break
        if len(known) == before:
            break
    winner = max(known, key=lambda c: known[c])
    return Found(winner, known[winner], known[first], tuple(history))


def _mutate(
    parent: Candidate,
    least: Sequence[int],
    most: Sequence[int],
    steps: int,
    moves: int,
    largest: int,
    generator: np.random.Generator,
) -> Candidate:
    """A child with the parent's total, within the bounds; the parent where nothing can move."""
    child = list(parent)
    for _ in range(int(generator.integers(1, moves + 1))):
        pairs = [
            (a, b)
            for a in range(len(child))
            for b in range(len(child))
            if a != b and child[a] - steps >= least[a] and child[b] + steps <= most[b]
        ]
        if not pairs:
            break
        a, b = pairs[int(generator.integers(len(pairs)))]
        room = min(child[a] - least[a], most[b] - child[b]) // steps
        amount = steps * int(generator.integers(1, min(room, largest) + 1))
        child[a] -= amount
        child[b] += amount
    return tuple(child)
