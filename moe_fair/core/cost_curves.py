"""Cost curves: what it costs one group to lose its first m units, measured at a few depths.

    cost(m) = loss with the first m units of the removal order gone - loss with nothing removed

Between the measured depths the curve is read by interpolation that rises wherever the measurements
rise: negative values count as 0, isotonic least squares (pool adjacent violators) makes the points
rise, and the monotone cubic of Fritsch and Carlson (1980, SIAM J. Numer. Anal. 17) runs through
them. Convexity is not assumed. A curve belongs to one removal order.

Shape legend: N units of a group, J measured depths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_fair.core.units import Statistics, UnitGroup

PARTS = 8  # depths measured on the way to the floor
DEPTHS, CHANGES, FACTS = "curve_depths", "curve_changes", "curves"  # names in the statistics


def depths_to_measure(group: UnitGroup) -> list[int]:
    """1/8, 2/8, ... of the way to the group's floor, in whole units (of every block)."""
    steps = (group.size - group.floor) // group.blocks
    return sorted({round(steps * i / PARTS) * group.blocks for i in range(1, PARTS + 1)} - {0})


def fill(depths: np.ndarray, changes: np.ndarray, size: int) -> np.ndarray:
    """[N + 1] cost at every depth from those measured.

    Args:
        depths: [J] rising, without 0, where the cost is 0 by definition.
        changes: [J] measured.

    Below the last measured depth the curve is interpolated; deeper, which only a floor below the
    group's own can ask for, it goes on with the slope of the last piece.
    """
    x = np.concatenate([[0.0], np.asarray(depths, dtype=np.float64)])
    y = np.concatenate([[0.0], isotonic(np.maximum(np.asarray(changes, dtype=np.float64), 0.0))])
    at = np.arange(size + 1, dtype=np.float64)
    if len(x) == 1:
        return np.zeros(size + 1)
    inside = np.clip(at, None, x[-1])
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    costs = monotone_cubic(x, y, inside) + (at - inside) * slope
    return np.maximum.accumulate(costs)  # the cubic rises but for rounding


def isotonic(values: np.ndarray) -> np.ndarray:
    """The rising sequence nearest to the values in least squares: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for v in values:
        total, count = float(v), 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            t, c = pools.pop()
            total, count = total + t, count + c
        pools.append((total, count))
    return np.concatenate([np.full(c, t / c) for t, c in pools]) if pools else np.zeros(0)


def monotone_cubic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The piecewise cubic through (x, y) that rises where y rises.

    Slopes at the knots are the weighted harmonic means of the neighbouring pieces' (Fritsch and
    Butland 1984), at the ends those of the end pieces by three points, limited to keep the shape.
    """
    h, d = np.diff(x), np.diff(y) / np.diff(x)
    if len(x) == 2:
        return y[0] + d[0] * (at - x[0])
    m = np.zeros_like(y)
    for k in range(1, len(x) - 1):
        if d[k - 1] * d[k] > 0:
            w, v = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
            m[k] = (w + v) / (w / d[k - 1] + v / d[k])
    m[0], m[-1] = _end(h[0], h[1], d[0], d[1]), _end(h[-1], h[-2], d[-1], d[-2])
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(h) - 1)
    width = h[left]
    t = (at - x[left]) / width
    return (
        y[left] * (1 + 2 * t) * (1 - t) ** 2
        + width * m[left] * t * (1 - t) ** 2
        + y[left + 1] * t**2 * (3 - 2 * t)
        + width * m[left + 1] * t**2 * (t - 1)
    )


def _end(h0: float, h1: float, d0: float, d1: float) -> float:
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    if slope * d0 <= 0:
        return 0.0
    return 3 * d0 if d0 * d1 <= 0 and abs(slope) > abs(3 * d0) else slope


def attach(
    statistics: Statistics,
    changes: Mapping[str, Tensor],
    removal: str,
    weights: Mapping[str, float] | None,
    **facts: Any,
) -> Statistics:
    """The statistics with measured curves, which are saved and loaded with them.

    Args:
        changes: group name -> [J] loss changes at `depths_to_measure`.
        removal, weights: the criterion and the domain weights of the removal order.
        metadata: whatever explains the measurement.
    """
    constants = {
        g.name: {
            **statistics.constants.get(g.name, {}),
            DEPTHS: torch.tensor(depths_to_measure(g), dtype=torch.int64),
            CHANGES: changes[g.name].to(torch.float64),
        }
        for g in statistics.without_following().groups
    }
    about = {"removal": removal, "weights": _plain(weights), **facts}
    return replace(
        statistics,
        constants={**statistics.constants, **constants},
        metadata={**statistics.metadata, FACTS: about},
    )


def curves(
    statistics: Statistics, removal: str, weights: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """Group name -> [N + 1] costs, of the removal order that this criterion gives.

    Raises:
        ValueError: no curves were measured, or those of another removal order.
    """
    if not holds_curves(statistics, removal, weights):
        about = statistics.metadata.get(FACTS)
        have = (
            "hold no cost curves"
            if about is None
            else f"hold the cost curves of {_order(about['removal'], about['weights'])}"
        )
        raise ValueError(
            f"these statistics {have}, and the plan needs those of {_order(removal, weights)}: "
            f"`moe-fair calibrate MODEL --curves {removal}` measures them, and so does `moe-fair "
            "prune` by itself"
        )
    return {
        g.name: fill(
            statistics.constants[g.name][DEPTHS].numpy(),
            statistics.constants[g.name][CHANGES].numpy(),
            g.size,
        )
        for g in statistics.without_following().groups
    }


def holds_curves(
    statistics: Statistics, removal: str, weights: Mapping[str, float] | None = None
) -> bool:
    """The statistics hold the cost curves of this removal order."""
    about = statistics.metadata.get(FACTS)
    return about is not None and (about["removal"], about["weights"]) == (removal, _plain(weights))


def _plain(weights: Mapping[str, float] | None) -> dict[str, float] | None:
    return dict(weights) if weights else None


def _order(removal: str, weights: Mapping[str, float] | None) -> str:
    if not weights:
        return removal
    return f"{removal} with weights {','.join(f'{d}={w:g}' for d, w in weights.items())}"
