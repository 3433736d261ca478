"""Wasserstein distances between samples, exact in one dimension, sliced in more.

    W1(a, b) = ∫₀¹ |Qa(q) - Qb(q)| dq,      Q the empirical quantile function

is a finite sum: both Q are steps, so the integral runs over the merged steps i/nₐ and j/n_b. The
merged steps depend on the sample sizes alone, hence one plan serves every unit and projection.

Shape legend: S samples, C classes, N units, P positions of a unit's output, D directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def directions(positions: int, count: int, seed: int) -> Tensor:
    """[P, D] float32 unit vectors, drawn once from the seed; a single position gives [[1.]].

    In one dimension every direction is ±1 and gives the same distance: one is enough.
    """
    if positions == 1:
        return torch.ones(1, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(positions, count, generator=generator, dtype=torch.float64)
    return (drawn / drawn.norm(dim=0, keepdim=True)).float()


@dataclass(frozen=True)
class _Steps:
    """Merged quantile steps of two sample sizes: which order statistics meet over which width."""

    first: np.ndarray
    second: np.ndarray
    width: np.ndarray


def _merge(n: int, m: int) -> _Steps:
    # in units of 1/(n·m), so that equal steps are equal integers
    ends = np.unique(np.concatenate([np.arange(1, n + 1) * m, np.arange(1, m + 1) * n]))
    starts = np.concatenate([[0], ends[:-1]])
    return _Steps(starts // m, starts // n, (ends - starts) / (n * m))


def between_classes(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """W1 between every two classes along each column of samples.

    Args:
        values: [..., S] one-dimensional samples.
        labels: [S] class of each sample.

    Returns:
        [pairs, ...] distances, pairs in the order (0, 1), (0, 2), ..., (1, 2), ... of the classes
        present.

    Raises:
        ValueError: fewer than two classes.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError("the U-Score compares classes: the samples hold fewer than two")
    sorts = [np.sort(values[..., labels == c], axis=-1) for c in present]
    steps: dict[tuple[int, int], _Steps] = {}
    found = []
    for i, a in enumerate(sorts):
        for b in sorts[i + 1 :]:
            n, m = a.shape[-1], b.shape[-1]
            if n == m:
                gap = np.subtract(a, b)
                np.abs(gap, out=gap)
                found.append(gap.mean(axis=-1, dtype=np.float64))
                continue
            if (n, m) not in steps:
                steps[n, m] = _merge(n, m)
            s = steps[n, m]
            found.append(np.abs(a[..., s.first] - b[..., s.second]) @ s.width)
    return np.stack(found)


def largest_class_distance(
    projected: np.ndarray, labels: np.ndarray, chunk_bytes: int = 1 << 26
) -> np.ndarray:
    """max over class pairs of the mean over directions of W1: the U-Score of each unit.

    Args:
        projected: [N, D, S] each unit's output along each direction.
        labels: [S].
        chunk_bytes: units are taken in chunks of about this size.

    Returns:
        [N] float64.
    """
    n, d, s = projected.shape
    # single numbers are exact in float64 at no cost; of many directions the mean is taken anyway
    kind = np.float64 if d == 1 else projected.dtype
    step = max(1, chunk_bytes // (d * s * projected.itemsize))
    parts = [
        between_classes(projected[i : i + step].astype(kind, copy=False), labels)
        .mean(axis=-1)
        .max(axis=0)
        for i in range(0, n, step)
    ]
    return np.concatenate(parts)
