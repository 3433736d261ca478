"""Relative Repairability (arXiv 2605.25508): RR = D_res / D_raw, what repair leaves of the damage.

Each layer alone is pruned by magnitude to the global sparsity, on the dense model's own inputs; y
is its dense output and y' the pruned one, per output channel c over images and positions:

    D_raw = Σ (y - y')² / Σ y²
    D_res = Σ (y - ŷ)² / Σ y²,    ŷ_c = (y'_c - mean y'_c)·std y_c / std y'_c + mean y_c

Density ∝ RR, so that layers whose damage repair takes back give most. How the paper limits that is
not public. Ours: every layer keeps at least a quarter of the global density and one weight, and at
most the weights it has; what a limit holds back goes to the other layers in the same proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.core.units import Budget
from moe_fair.vision.gates import channel_axis
from moe_fair.vision.graph import logits
from moe_fair.vision.sparse.fill import shares
from moe_fair.vision.sparse.layers import DEAD, Layer, Net, hooked, largest

name = "rr"
needs_images = True
LEAST = 0.25  # of the global density, in any layer


def allocate(net: Net, keep: int) -> Budget:
    """k_l ∝ RR_l · size_l, within the limits."""
    return by_repairability(name, net, keep, lambda x: x.size)


def by_repairability(rule: str, net: Net, keep: int, base: Callable[[Layer], float]) -> Budget:
    """k_l ∝ RR_l · base(layer), within the limits; explained by every layer's numbers."""
    density = keep / sum(x.size for x in net.layers)
    if (name, density) not in net.known:
        net.known[name, density] = repairability(net, density)
    found = net.known[name, density]
    wanted = {x.name: found[x.name]["rr"] * base(x) for x in net.layers}

    def least(x: Layer) -> int:
        return min(x.present, max(1, int(LEAST * density * x.size)))

    if sum(least(x) for x in net.layers) > keep:  # hardly more weights than layers
        return Budget(shares(net.layers, wanted, keep), rule, {"layers": found})
    return Budget(shares(net.layers, wanted, keep, least), rule, {"layers": found})


def repairability(net: Net, density: float) -> dict[str, dict[str, float]]:
    """Layer -> `raw`, `residual` and `rr` when it alone keeps this share of its weights.

    A layer that pruning does not change has nothing to repair: 0.
    """
    sums = {x.name: _Sums() for x in net.layers}

    def hook(x: Layer) -> Any:
        layer = net.model.get_submodule(x.name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        pruned = nn.Parameter(
            weight.detach() * largest(weight, min(x.present, max(1, round(density * x.size)))),
            requires_grad=False,
        )

        def measure(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            layer.weight = pruned
            try:
                other = layer.forward(*inputs)
            finally:
                layer.weight = weight
            y, z = (o.movedim(channel_axis(layer), 0).flatten(1).double() for o in (out, other))
            sums[x.name].add(y, z)

        return measure

    with hooked(net.model, {x.name: hook(x) for x in net.layers}), torch.no_grad():
        for images in net.batches():
            logits(net.model, images)
    return {n: s.repairability() for n, s in sums.items()}


class _Sums:
    """[C] moments of two outputs of a layer, over batches."""

    def __init__(self) -> None:
        self.n = 0
        self.parts: list[Any] = []

    def add(self, y: Tensor, z: Tensor) -> None:
        d = y - z
        pairs = [torch.einsum("cp,cp->c", a, b) for a, b in ((y, y), (z, z), (y, z), (d, d))]
        found = [y.sum(1), z.sum(1), *pairs]
        self.parts = [a + b for a, b in zip(self.parts or [0.0] * 6, found, strict=True)]
        self.n += y.shape[1]

    def repairability(self) -> dict[str, float]:
        y, z, yy, zz, yz, raw = self.parts
        size = float(yy.sum())
        # Σ (y - ŷ)² = Σ ỹ² - 2 a Σ ỹ z̃ + a² Σ z̃², where a = std y / std z and ~ is less the mean
        ss, tt, st = yy - y * y / self.n, zz - z * z / self.n, yz - y * z / self.n
        alive = tt > DEAD * zz
        a = torch.where(alive, (ss.clamp(min=0) / tt.clamp(min=1e-300)).sqrt(), 0.0)
        residual = (ss - 2 * a * st + a * a * tt).clamp(min=0)
        d_raw, d_res = float(raw.sum()), float(residual.sum())
        scale = size if size > 0 else 1.0
        return {
            "raw": d_raw / scale,
            "residual": d_res / scale,
            "rr": d_res / d_raw if d_raw > 0 else 0.0,
        }
