"""Meeting a total exactly: shares with limits, or one threshold over all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_fair.vision.sparse.layers import Layer


def check_total(layers: Sequence[Layer], keep: int) -> None:
    """So many weights can be kept.

    Raises:
        ValueError: they cannot; says the range.
    """
    size, present = sum(x.size for x in layers), sum(x.present for x in layers)
    least = sum(least_of(x) for x in layers)
    if keep > present:
        raise ValueError(
            f"the model is sparser already: {1 - present / size:.4%} of its weights are zero, and "
            f"--sparsity {1 - keep / size:g} would leave more; give a higher --sparsity"
        )
    if keep < least:
        raise ValueError(
            f"--sparsity {1 - keep / size:g} leaves {keep} weights for {least} layers, each of "
            f"which keeps one: the highest is {1 - least / size:.6f}"
        )


def least_of(layer: Layer) -> int:
    """Fewest weights that a layer keeps: one, if it has any."""
    return min(1, layer.present)


def shares(
    layers: Sequence[Layer],
    wanted: Mapping[str, float],
    keep: int,
    least: Callable[[Layer], int] = least_of,
) -> dict[str, int]:
    """Weights kept in proportion to `wanted`; what a limit holds back goes to the other layers.

    k_l = clip(c · wanted_l, least_l, present_l) with the one c whose sum is `keep`, rounded by
    largest remainders, ties by order.

    Args:
        wanted: layer name -> proportion, at least 0.
        least: fewest that a layer keeps.
    """
    low = np.array([least(x) for x in layers], dtype=float)
    high = np.array([x.present for x in layers], dtype=float)
    d = np.array([wanted[x.name] for x in layers], dtype=float)
    assert low.sum() <= keep <= high.sum()
    assert (d >= 0).all()
    assert np.isfinite(d).all()
    size, most = np.maximum(high, 1), d.max()
    # layers that want nothing share by their size what no other can take
    d = np.maximum(d, 1e-12 * most * size / size.max()) if most > 0 else size

    def at(c: float) -> np.ndarray:
        return np.clip(c * d, low, high)

    below, above = 0.0, float((high / d).max())
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if at(middle).sum() <= keep else (below, middle)
    exact = at(below)
    kept = np.floor(exact + 1e-9)
    order = np.argsort(-(exact - kept), kind="stable")
    while (left := int(keep - kept.sum())) > 0:
        open_ = [i for i in order if kept[i] < high[i]][:left]
        kept[open_] += 1
    while (left := int(kept.sum() - keep)) > 0:
        open_ = [i for i in order[::-1] if kept[i] > low[i]][:left]
        kept[open_] -= 1
    return {x.name: int(k) for x, k in zip(layers, kept, strict=True)}


def threshold(layers: Sequence[Layer], scores: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """Weights kept where the `keep` highest scores of all layers stay, equal ones by order.

    Args:
        scores: layer name -> [weights] score; within a layer in the order of magnitudes.
    """
    assert sum(least_of(x) for x in layers) <= keep <= sum(x.present for x in layers)
    if keep == 0:  # a model without any weight
        return {x.name: 0 for x in layers}
    found = []
    for x in layers:
        s = scores[x.name].flatten().clone()
        s[s.topk(least_of(x)).indices] = torch.inf
        found.append(s)
    every = torch.cat(found)
    border = every.kthvalue(len(every) - keep + 1).values
    kept = [int((s > border).sum()) for s in found]
    left = keep - sum(kept)
    for i, s in enumerate(found):
        more = min(left, int((s == border).sum()))
        kept[i] += more
        left -= more
    return {x.name: k for x, k in zip(layers, kept, strict=True)}
