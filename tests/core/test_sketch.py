"""Sketches: exact while few, near when binned, the same however the values come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from moe_fair.core.sketch import (
    CAPACITY,
    DIRECTIONS,
    OCTAVES,
    SIDE,
    Cell,
    Sketch,
    directions,
    distance,
    edges,
)

CHECK = settings(max_examples=60, deadline=None, derandomize=True)


def values(
    seed: int, n: int, scale: float = 1.0, shift: float = 0.0, rows: int = 3
) -> torch.Tensor:
    """[rows, n] with heavy tails."""
    rng = np.random.default_rng(seed)
    return torch.tensor((rng.standard_t(3, (rows, n)) + shift) * scale, dtype=torch.float32)


def scipys(a: torch.Tensor, b: torch.Tensor, zeros: tuple[int, int] = (0, 0)) -> list[float]:
    return [
        wasserstein_distance(
            np.concatenate([x.double().numpy(), np.zeros(zeros[0])]),
            np.concatenate([y.double().numpy(), np.zeros(zeros[1])]),
        )
        for x, y in zip(a, b, strict=True)
    ]


@CHECK
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 40), st.integers(0, 30))
def test_few_values_give_scipys_distance(seed: int, n: int, m: int, more: int) -> None:
    a, b = values(seed, n), values(seed + 1, m, 2.0, 0.3)
    zeros = (more + (n == 0), more // 2)
    got = distance(Cell.of(a), Cell.of(b), zeros)
    assert got.numpy() == pytest.approx(scipys(a, b, zeros), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("zeros", [(0, 0), (5000, 20_000)])
def test_many_values_come_within_a_percent(scale: float, zeros: tuple[int, int]) -> None:
    a, b = values(0, 4000, scale), values(1, 3000, scale, 0.3)
    one, other = Cell.of(a), Cell.of(b)
    assert one.values is other.values is None
    assert distance(one, other, zeros).numpy() == pytest.approx(scipys(a, b, zeros), rel=0.01)
    few = values(2, CAPACITY, scale, -0.3)  # one of the two still as it is
    assert distance(one, Cell.of(few), zeros).numpy() == pytest.approx(
        scipys(a, few, zeros), rel=0.01
    )


@CHECK
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.integers(-20, 20),
)
def test_the_order_of_shards_does_not_show(seed: int, sizes: list[int], octaves: int) -> None:
    parts = [values(seed + i, n, 2.0 ** (octaves * i)) for i, n in enumerate(sizes)]
    parts[0][:, 0] = 0.0
    whole = Cell.of(torch.cat(parts, 1))
    for order in (range(len(parts)), reversed(range(len(parts)))):
        merged = Cell.of(torch.zeros(3, 0))
        for i in order:
            merged = merged.merge(Cell.of(parts[i]))
        assert merged.count == whole.count
        if whole.values is not None:
            assert merged.values is not None
            assert torch.equal(merged.values, whole.values)
        else:
            assert merged.bins is not None
            assert merged.top == whole.top
            assert torch.equal(merged.bins, whole.bins)


@CHECK
@given(st.integers(0, 10**6), st.integers(-30, 30))
def test_bins_hold_what_lies_between_their_borders(seed: int, power: int) -> None:
    x = values(seed, 400, 2.0**power, rows=2)
    x[0, :4] = torch.tensor([0.0, 2.0**power, -(2.0**power), 1.5 * 2.0**power])
    cell = Cell.of(x)
    assert cell.bins is not None
    at = edges(cell.top)
    assert cell.bins.shape == (2, 2 * SIDE) == (2, len(at) - 1)
    for row, counts in zip(x.double().numpy(), cell.bins, strict=True):
        positive = np.histogram(row[row >= 0], at[SIDE:])[0]
        negative = np.histogram(-row[row < 0], -at[SIDE::-1])[0][::-1]  # closed away from zero
        assert counts.tolist() == [*negative, *positive]
    assert at[SIDE + 1] == 2.0 ** (cell.top - OCTAVES)


def sketch(seed: int, sizes: list[tuple[int, int, int]]) -> tuple[Sketch, dict]:
    made, kept = Sketch(2, 3), {}
    for i, (domain, unit, n) in enumerate(sizes):
        kept[domain, unit] = values(seed + i, n, 1.0 + i, rows=DIRECTIONS)
        made.add(domain, torch.full((n,), unit), kept[domain, unit].T)
    return made, kept


def test_scores_are_the_definition_and_packing_brings_them_back() -> None:
    made, kept = sketch(0, [(0, 0, 50), (1, 0, 70), (0, 1, 20), (0, 2, 900), (1, 2, 30)])
    tokens = torch.tensor([1000.0, 400.0])
    none = torch.zeros(DIRECTIONS, 0)
    got = made.scores(tokens)
    for unit in range(3):
        a, b = kept.get((0, unit), none), kept.get((1, unit), none)
        want = np.mean(scipys(a, b, (1000 - a.shape[1], 400 - b.shape[1])))
        assert float(got[unit]) == pytest.approx(want, rel=1e-2 if unit == 2 else 1e-12)
    again = Sketch.unpack(made.pack())
    assert torch.equal(again.scores(tokens), got)
    assert all(torch.equal(v, again.pack()[k]) for k, v in made.pack().items())
    assert torch.equal(made.merge(Sketch(2, 3)).scores(tokens), got)


def test_nan_is_said() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        Sketch(1, 1).add(0, torch.zeros(1).long(), torch.full((1, DIRECTIONS), float("nan")))


@pytest.mark.parametrize("parts", [1, 7])
def test_units_together_are_as_each_alone(parts: int) -> None:
    """Above and below what is kept as it is, all zeros, tiny values, growing ones."""
    sizes = [0, 1, CAPACITY, CAPACITY + 1, 900, 300, 400]
    each = [values(i, n, 10.0 ** (i - 4), rows=DIRECTIONS) for i, n in enumerate(sizes)]
    each[5].zero_()
    each[6] *= 1e-36
    each[6][:, 0] = 1e-42  # below the smallest normal number
    units = torch.cat([torch.full((n,), u) for u, n in enumerate(sizes)])
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))
    made, rows = Sketch(1, len(sizes)), torch.cat(each, 1).T[order]
    for some in order.tensor_split(parts):
        at = torch.isin(order, some)
        made.add(0, units[order[at]], rows[at])
    for unit, its in enumerate(each):
        want = Cell.of(its)
        if not want.count:
            assert (0, unit) not in made.cells
            continue
        got = made.cells[0, unit]
        assert (got.count, got.top) == (want.count, want.top)
        for a, b in ((got.values, want.values), (got.bins, want.bins)):
            assert a is b is None or torch.equal(a, b)


def test_directions_are_unit_vectors_and_stay() -> None:
    axes = directions(48)
    assert axes.norm(dim=0).numpy() == pytest.approx(np.ones(DIRECTIONS), abs=1e-6)
    assert torch.equal(axes, directions(48))
