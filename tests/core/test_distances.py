"""Wasserstein distances between classes against scipy, in one dimension and sliced."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from moe_fair.core.distances import between_classes, directions, largest_class_distance


def classed(counts: list[int], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Samples [*shape, S] with another mean for each class, and labels [S], shuffled."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    means = rng.normal(size=(*shape, len(counts)))
    return means[..., labels] + rng.normal(size=(*shape, len(labels))), labels


def scipys(values: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of one row, for every pair of classes."""
    return [
        wasserstein_distance(values[labels == a], values[labels == b])
        for a, b in combinations(np.unique(labels), 2)
    ]


@pytest.mark.parametrize("counts", [[6, 6, 6], [5, 17, 8, 1], [3, 3, 4], [1, 2]])
def test_distances_of_single_numbers(counts: list[int]) -> None:
    values, labels = classed(counts, (4,))
    found = between_classes(values, labels * 3 + 5)  # labels need not be 0, 1, ...
    assert found.shape == (len(counts) * (len(counts) - 1) // 2, 4)
    for unit in range(4):
        assert found[:, unit] == pytest.approx(scipys(values[unit], labels), rel=1e-12)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 26])
@pytest.mark.parametrize("count", [1, 8])
def test_the_largest_mean_over_directions(count: int, chunk_bytes: int) -> None:
    values, labels = classed([9, 4, 6], (7, count))
    found = largest_class_distance(values.astype(np.float32), labels, chunk_bytes)
    wanted = [
        np.mean([scipys(v, labels) for v in unit.astype(np.float32)], axis=0).max()
        for unit in values
    ]
    assert found.dtype == np.float64
    assert found == pytest.approx(wanted, rel=1e-12 if count == 1 else 1e-5)


def test_single_numbers_keep_the_precision_of_float64() -> None:
    """In float32 the gap of these two would be lost beside their size."""
    values = np.array([[[2.0**24, 2.0**24 + 2, 1.0]]], dtype=np.float32)
    found = largest_class_distance(values, np.array([0, 0, 1]))
    assert found.tolist() == [2.0**24]


def test_directions_are_unit_vectors_of_the_seed() -> None:
    drawn = directions(7, 32, 3)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (7, 32)
    assert drawn.norm(dim=0).numpy() == pytest.approx(np.ones(32), abs=1e-6)
    assert torch.equal(drawn, directions(7, 32, 3))
    assert not torch.equal(drawn, directions(7, 32, 4))
    assert torch.equal(directions(1, 32, 3), torch.ones(1, 1))
    assert directions(2, 5, 3).shape == (2, 5)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        between_classes(np.ones((2, 5)), np.zeros(5))
