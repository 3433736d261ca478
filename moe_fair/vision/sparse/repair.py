"""Channelwise variance matching: every output channel gets the dense mean and variance back.

    ŷ_c = α_c y'_c + β_c,    α_c = 1 + q_c (σ_c/σ'_c - 1),    β_c = μ_c - α_c μ'_c

over the calibration images and positions, y' being the pruned layer's output behind the layers
that are repaired already. q_c = v / (v + λ) with v = σ'²_c/σ²_c shrinks the scale toward 1 where
little of the signal is left to amplify; λ = 0 is plain matching (arXiv 2605.25508), which gives the
dense mean and variance exactly. That such channels are the ones to hold back is from arXiv
2605.21426; the form of q and λ's default are ours. A channel that does not move any more keeps its
scale and gets the mean.

Nothing is added to the model: α goes into the channel's weights, β into the layer's bias, or where
it has none into the running mean of the batch normalisation that reads it. A layer with neither has
no place for β and takes α alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_fair.vision.gates import channel_axis
from moe_fair.vision.graph import BATCH_NORMS, logits
from moe_fair.vision.sparse.layers import DEAD, Layer, hooked

SHRINKAGE = 0.003


@dataclass(frozen=True)
class Moments:
    """[C] mean and variance of a layer's output channels over images and positions, float64."""

    mean: Tensor
    variance: Tensor


def moments(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> dict[str, Moments]:
    """Of every layer's output, all images in one forward."""
    found: dict[str, Moments] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def measure(layer: nn.Module, _: object, out: Tensor) -> None:
            found[name] = _moments(layer, out)

        return measure

    with hooked(model, {x.name: hook(x.name) for x in layers}), torch.no_grad():
        logits(model, images.to(next(model.parameters()).device))
    return found


def match_variance(
    model: nn.Module,
    dense: dict[str, Moments],
    layers: Sequence[Layer],
    images: Tensor,
    *,
    shrinkage: float = SHRINKAGE,
) -> dict[str, str]:
    """Repair a pruned model in place, layer by layer in one forward of all images.

    Args:
        dense: `moments` of the model before it was pruned, on the same images.
        shrinkage: λ; 0 matches to the full.

    Returns:
        layer -> where its shift went: `bias`, the name of a batch normalisation, or `nowhere`.
    """
    norms = _norms(model, layers, images[:2])
    places: dict[str, str] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def repair(layer: nn.Module, _: object, out: Tensor) -> Tensor:
            scale, shift = _fit(dense[name], _moments(layer, out), shrinkage)
            places[name] = _fold(model, layer, norms.get(name), scale, shift)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            form = (-1, *[1] * (weight.dim() - 2))  # channels, then the axes of the kernel
            out = out * scale.to(out.dtype).view(form)
            return out + shift.to(out.dtype).view(form) if places[name] == "bias" else out

        return repair

    with hooked(model, {x.name: hook(x.name) for x in layers}), torch.no_grad():
        logits(model, images.to(next(model.parameters()).device))
    return places


def _moments(layer: nn.Module, out: Tensor) -> Moments:
    axis = channel_axis(layer) % out.dim()
    others = [d for d in range(out.dim()) if d != axis]
    variance, mean = torch.var_mean(out.double(), dim=others, correction=0)
    return Moments(mean, variance)


def _fit(dense: Moments, pruned: Moments, shrinkage: float) -> tuple[Tensor, Tensor]:
    """[C] α and β."""
    alive = pruned.variance > DEAD * pruned.mean.square()
    alive &= pruned.variance > 0
    have = torch.where(alive, pruned.variance, 1.0)
    part = have / (have + shrinkage * dense.variance)
    scale = 1 + part * ((dense.variance / have).sqrt() - 1)
    scale = torch.where(alive, scale, 1.0)
    return scale, dense.mean - scale * pruned.mean


def _fold(
    model: nn.Module, layer: nn.Module, norm: str | None, scale: Tensor, shift: Tensor
) -> str:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() * scale + shift)
        return "bias"
    if norm is None:
        return "nowhere"
    running = model.get_submodule(norm).running_mean
    assert isinstance(running, Tensor)
    running.copy_(running.double() - shift)
    return norm


def _norms(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> dict[str, str]:
    """Layer -> the batch normalisation that reads its output, and nothing else's."""
    outputs: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}
    found: dict[str, str] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        return lambda _, __, out: outputs.append((name, out))

    def read(norm: str):  # type: ignore[no-untyped-def]
        def look(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            makers = [n for n, out in outputs if out is inputs[0]]
            readers.setdefault(norm, []).append(makers[0] if makers else "")

        return look

    hooks = {x.name: keep(x.name) for x in layers}
    hooks |= {
        n: read(n)
        for n, m in model.named_modules()
        if isinstance(m, BATCH_NORMS) and m.running_mean is not None
    }
    with hooked(model, hooks), torch.no_grad():
        logits(model, images.to(next(model.parameters()).device))
    for norm, makers in readers.items():
        if len(makers) == 1 and makers[0]:
            found[makers[0]] = norm
    return found
