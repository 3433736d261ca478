"""The U-Score against scipy, a naive sliced loop, and itself under other batches and limits."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

from moe_fair.core.distances import between_classes, directions, largest_class_distance
from moe_fair.vision.collect import collect
from moe_fair.vision.criteria import criterion
from moe_fair.vision.graph import Graph
from moe_fair.vision.proof import find_groups
from moe_fair.vision.unit_outputs import MeasureConfig, u_scores

SEED = 3


def classed(counts: list[int], shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Samples [*shape, S] in float64 with another mean for each class, and labels [S], shuffled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    means = rng.normal(size=(*shape, len(counts)))
    return means[..., labels] + rng.normal(size=(*shape, len(labels))), labels


@pytest.mark.parametrize("counts", [[20, 20, 20], [5, 17, 8, 1]])
def test_scalar_distances_equal_scipy(counts: list[int]) -> None:
    values, labels = classed(counts, (6,))
    found = between_classes(values, labels)
    for row, (a, b) in zip(found, combinations(range(len(counts)), 2), strict=True):
        for unit in range(6):
            wanted = wasserstein_distance(values[unit, labels == a], values[unit, labels == b])
            assert abs(row[unit] - wanted) <= 1e-9


@pytest.mark.parametrize("counts", [[12, 12, 12], [4, 9, 6]])
def test_sliced_distances_equal_a_naive_loop(counts: list[int]) -> None:
    values, labels = classed(counts, (3, 10))  # 3 units of 10 positions
    theta = directions(10, 16, SEED).double().numpy()
    projected = np.einsum("nps,pd->nds", values, theta)
    found = largest_class_distance(projected, labels)
    for unit in range(3):
        pairs = []
        for a, b in combinations(range(len(counts)), 2):
            sliced = [
                wasserstein_distance(
                    values[unit][:, labels == a].T @ theta[:, d],
                    values[unit][:, labels == b].T @ theta[:, d],
                )
                for d in range(16)
            ]
            pairs.append(np.mean(sliced))
        assert found[unit] == pytest.approx(max(pairs), abs=1e-9)


def test_directions_are_unit_vectors_of_the_seed() -> None:
    drawn = directions(7, 32, SEED)
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(32))
    assert torch.equal(drawn, directions(7, 32, SEED))
    assert not torch.equal(drawn, directions(7, 32, SEED + 1))
    assert torch.equal(directions(1, 32, SEED), torch.ones(1, 1))


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        between_classes(np.ones((2, 5)), np.zeros(5))


class Small(nn.Module):
    """Maps read after normalisation and ReLU, then numbers after pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)
        self.b, self.head = nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.a(x)))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.b(self.first(x))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(x))


@pytest.fixture(scope="module")
def problem() -> tuple[Small, Graph, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-0.2, 0.2)
        model.bn.bias.uniform_(-0.2, 0.2)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 2, 1, 0, 0])
    images = torch.randn(13, 1, 8, 8) + labels[:, None, None, None]
    return model, find_groups(model, images[:2]), images, labels


def naive(outputs: torch.Tensor, labels: torch.Tensor, count: int, seed: int) -> list[float]:
    """[S, N, P] -> U of every unit, by scipy."""
    theta = directions(outputs.shape[-1], count, seed)
    scores = []
    for unit in range(outputs.shape[1]):
        o = (outputs[:, unit] @ theta).double().numpy()
        scores.append(
            max(
                np.mean(
                    [
                        wasserstein_distance(o[labels == a, d], o[labels == b, d])
                        for d in range(theta.shape[1])
                    ]
                )
                for a, b in combinations(range(3), 2)
            )
        )
    return scores


def test_units_are_tapped_where_they_are_read(
    problem: tuple[Small, Graph, torch.Tensor, torch.Tensor],
) -> None:
    model, graph, images, labels = problem
    watch = MeasureConfig(batch_size=4, directions=12, seed=SEED)
    found = collect(model, graph, images, labels, needs=["u_score"], watch=watch)
    with torch.no_grad():
        maps, numbers = model.first(images).flatten(2), model.second(images)[..., None]
    scores = criterion("u-score")(found).values
    np.testing.assert_allclose(scores["a"], naive(maps, labels, 12, SEED), rtol=1e-5)
    # single numbers to 1e-9, before scores are rounded and from the very same forward
    images, labels = _sorted(images, labels)
    raw = u_scores(model, graph, images, labels, MeasureConfig(directions=12, seed=SEED))["b"]
    with torch.no_grad():
        numbers = model.second(images)[..., None]
    np.testing.assert_allclose(raw, naive(numbers, labels, 12, SEED), rtol=0, atol=1e-9)


def test_batches_and_memory_limits_change_nothing(
    problem: tuple[Small, Graph, torch.Tensor, torch.Tensor],
) -> None:
    model, graph, images, labels = problem
    order = torch.argsort(labels, stable=True)
    images, labels = images[order], labels[order]
    whole = u_scores(model, graph, images, labels, MeasureConfig(directions=12))
    small = u_scores(
        model, graph, images, labels, MeasureConfig(batch_size=5, directions=12, memory=1300)
    )
    for name in whole:
        torch.testing.assert_close(small[name], whole[name], rtol=1e-5, atol=1e-7)


def test_a_unit_that_two_layers_read_has_the_sum(
    problem: tuple[Small, Graph, torch.Tensor, torch.Tensor],
) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 4, 3)
            self.left, self.right = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1, stride=2)
            self.head = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            return self.head(self.left(y).mean((2, 3)) * self.right(torch.tanh(y)).mean((2, 3)))

    _, _, images, labels = problem
    torch.manual_seed(1)
    model = Forked().eval()
    graph = find_groups(model, images[:2])
    watch = MeasureConfig(directions=8, seed=SEED)
    found = u_scores(model, graph, *_sorted(images, labels), watch)
    with torch.no_grad():
        y = torch.relu(model.a(images))
    left, right = (naive(v.flatten(2), labels, 8, SEED) for v in (y, torch.tanh(y)))
    np.testing.assert_allclose(found["a"], np.add(left, right), rtol=1e-5)


def _sorted(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.argsort(labels, stable=True)
    return images[order], labels[order]
