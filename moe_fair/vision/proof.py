"""The mask check: a group may be cut only where the cut model equals the masked one.

Both run in float64 on a copy whose batch normalisations and bare parameters (LayerScale) are filled
with random numbers: fresh ones map 0 to 0 or scale a branch to nothing, and would hide a wrong cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import BATCH_NORMS, ChannelGroup, Graph, candidates, logits
from moe_fair.vision.surgery import cut, cuts_of

TOLERANCE = 1e-9  # relative to the largest output; float64 leaves about 1e-14


def find_groups(model: nn.Module, images: Tensor, *, heads: bool = False) -> Graph:
    """The unit groups of a model that a cut removes exactly, in model order.

    Args:
        images: an example batch of two or more images.
        heads: also try attention heads.

    Raises:
        ValueError: nothing can be cut; lists why.
    """
    training = model.training
    model.eval()
    try:
        graph = candidates(model, images[:2], heads=heads)
        groups, whole = list(graph.groups), dict(graph.whole)
        if groups:
            trial = _trial(model)
            x = images[:2].double()
            if error(trial, x, groups) > TOLERANCE:
                good = []
                for g in groups:
                    if error(trial, x, [g]) <= TOLERANCE:
                        good.append(g)
                    else:
                        whole[g.name] = "the cut model differs from the masked one"
                groups = good
                if groups and error(trial, x, groups) > TOLERANCE:
                    raise ValueError("groups that can each be cut cannot be cut together")
    finally:
        model.train(training)
    if not groups:
        reasons = "; ".join(f"{n}: {why}" for n, why in whole.items()) or "no layers were found"
        raise ValueError(f"no channels of this model can be cut exactly ({reasons})")
    # numbered as a reader counts them in the tables and pictures
    numbered = [replace(g, units=replace(g.units, layer=i)) for i, g in enumerate(groups)]
    return Graph(tuple(numbered), whole)


def error(model: nn.Module, images: Tensor, groups: Sequence[ChannelGroup]) -> float:
    """Largest relative difference between masked and cut model at a plan with unequal counts."""
    kept = uneven_plan(groups)
    gates = Gates(model, groups)
    gates.close(kept, groups)
    with torch.no_grad():
        with gates:
            masked = logits(model, images)
        small = copy.deepcopy(model)
        try:
            cut(small, cuts_of(groups, kept))
            pruned = logits(small, images)
        except (RuntimeError, ValueError):
            return float("inf")
    if pruned.shape != masked.shape:
        return float("inf")
    scale = masked.abs().max().clamp(min=1e-30)
    return float((pruned - masked).abs().max() / scale)


def uneven_plan(groups: Sequence[ChannelGroup], seed: int = 0) -> dict[str, Sequence[int]]:
    """Random units kept, another share in every group, equal numbers in every block."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, Sequence[int]] = {}
    for g in groups:
        width = g.units.size // g.units.blocks
        share = 0.3 + 0.6 * float(torch.rand((), generator=generator))
        count = min(max(1, round(share * width)), max(1, width - 1))
        ids = [
            b * width + int(i)
            for b in range(g.units.blocks)
            for i in torch.randperm(width, generator=generator)[:count]
        ]
        kept[g.name] = sorted(ids)
    return kept


def _trial(model: nn.Module) -> nn.Module:
    trial = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)

    def fill(t: Tensor | None, low: float, high: float) -> None:
        if t is not None:
            drawn = torch.rand(t.shape, generator=generator, dtype=torch.float64)
            t.copy_(low + (high - low) * drawn)

    with torch.no_grad():
        for layer in trial.modules():
            if isinstance(layer, BATCH_NORMS):
                fill(layer.weight, 0.5, 1.5)
                fill(layer.bias, -0.5, 0.5)
                fill(layer.running_mean, -0.5, 0.5)
                fill(layer.running_var, 0.5, 1.5)
            elif (
                next(layer.children(), None) is not None or "scale" in type(layer).__name__.lower()
            ):
                for p in layer.parameters(recurse=False):
                    fill(p, 0.5, 1.5)
    return trial
