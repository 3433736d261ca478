"""Tolerance of Difference over output channels (FAIR-Pruner, arXiv 2508.02291).

A layer's units are its output channels, with weights aggregated per channel: removal score Σ|w|,
protection score |Σ w·∂L/∂w| over images and the channel's weights. The depth that ToD gives a
layer, as a share of its channels, is the layer's sparsity; which weights go is decided by magnitude
as everywhere here. Without labels, L is the cross-entropy to the class that the dense model names.

Depths are whole channels, so between the two neighbouring totals that enclose the wanted number of
weights every layer goes the same part of the way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_fair.core.allocate import tod
from moe_fair.core.ranking import rank
from moe_fair.core.units import Budget, Scores, UnitGroup
from moe_fair.vision.graph import logits
from moe_fair.vision.sparse.fill import shares
from moe_fair.vision.sparse.layers import Net

name = "tod"
needs_images = True


def allocate(net: Net, keep: int) -> Budget:
    """k_l ∝ the share of the layer's channels that ToD keeps, times its size."""
    weights = {x.name: net.model.get_parameter(f"{x.name}.weight").detach() for x in net.layers}
    removal = Scores(
        "l1", {n: w.abs().flatten(1).sum(1).double().cpu() for n, w in weights.items()}
    )
    if name not in net.known:
        net.known[name] = taylor(net)
    protection = Scores("taylor-weight", net.known[name])
    groups = tuple(UnitGroup(x.name, i, x.shape[0], floor=0) for i, x in enumerate(net.layers))
    ranked = rank(groups, removal, protection)
    size = {x.name: x.size / x.shape[0] for x in net.layers}
    remove = sum(x.size for x in net.layers) - keep

    def gone(channels: int) -> dict[str, float]:
        """Weights that leave each layer when so many channels of all leave."""
        kept = tod.allocate(ranked, channels).kept
        return {g.name: (g.size - kept[g.name]) * size[g.name] for g in groups}

    low, high = 0, sum(g.size for g in groups)  # gone(low) <= remove < gone(high), or high is all
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(gone(middle).values()) <= remove else (low, middle)
    below, above = gone(low), gone(high)
    span = sum(above.values()) - sum(below.values())
    part = (remove - sum(below.values())) / span if span > 0 else 0.0
    wanted = {
        x.name: max(0.0, x.size - (1 - part) * below[x.name] - part * above[x.name])
        for x in net.layers
    }
    explanation = {"channels_removed": low, "protection": "taylor-weight", "removal": "l1"}
    return Budget(shares(net.layers, wanted, keep), name, explanation)


def taylor(net: Net) -> dict[str, Tensor]:
    """Layer -> [C_out] |Σ over images and the channel's weights of w·∂L/∂w|, float64."""
    model = net.model
    weights = [model.get_parameter(f"{x.name}.weight") for x in net.layers]
    flags = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    sums = [torch.zeros(len(w), dtype=torch.float64, device=w.device) for w in weights]
    model.requires_grad_(False).eval()
    for w in weights:
        w.requires_grad_(True)
    try:
        for x in net.batches():
            with torch.enable_grad():
                out = logits(model, x)
                loss = nn.functional.cross_entropy(out, out.detach().argmax(-1), reduction="sum")
                found = torch.autograd.grad(loss, weights)
            for total, w, g in zip(sums, weights, found, strict=True):
                total += (w.detach().double() * g.double()).flatten(1).sum(1)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        model.train(training)
    return {x.name: s.abs().cpu() for x, s in zip(net.layers, sums, strict=True)}
