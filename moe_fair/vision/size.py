"""Parameters and multiply-adds of a model as a function of how many units every group keeps.

Multiply-adds are those of convolutions and linear layers for one image (products of attention
weights and values have no layer and are not counted); other layers' parameters are counted too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.vision.graph import (
    BY_CHANNEL,
    NORMS,
    SPATIAL,
    TRANSPOSED,
    ChannelGroup,
    is_depthwise,
    logits,
)
from moe_fair.vision.layer_input import given
from moe_fair.vision.response_norm import response_norm


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds for one image."""

    parameters: int
    operations: int


@dataclass(frozen=True)
class _Layer:
    """What a layer's cost follows from; `per_*`: group name -> slices that leave with one unit."""

    kind: str
    inputs: int
    outputs: int
    kernel: int  # places; of what has numbers for every channel how many
    groups: int
    bias: bool
    places: int  # where the kernel is applied, over all calls of one forward
    per_in: dict[str, int]
    per_out: dict[str, int]

    def cost(self, removed: Mapping[str, int]) -> Cost:
        out = self.outputs - sum(removed[g] * n for g, n in self.per_out.items())
        if self.kind == "norm":
            return Cost(self.kernel * out * self.bias, 0)
        if self.kind == "depthwise":
            weights = out * self.kernel
        else:
            inputs = self.inputs - sum(removed[g] * n for g, n in self.per_in.items())
            weights = inputs // self.groups * out * self.kernel
        return Cost(weights + out * self.bias, weights * self.places)


class Sizes:
    """Costs of a model at any budget of its groups.

    Args:
        images: an example batch; the first image is run once.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], images: Tensor) -> None:
        self._groups = {g.name: g.units.size for g in groups}
        layers = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, (nn.Linear, *SPATIAL)) or _has_channels(m)
        }
        places = _places(model, layers, images[:1])
        sides: dict[tuple[str, str], dict[str, int]] = {}
        for g in groups:
            for m in g.members:
                sides.setdefault((m.module, m.side), {})[g.name] = len(m.index[0])
        self._layers = [
            _layer(
                m,
                places[n],
                sides.get((n, "in"), {}),
                sides.get((n, "out"), sides.get((n, "norm"), {})),
            )
            for n, m in layers.items()
        ]
        # all others; fewer where layers share a weight, more where one is computed from several
        nothing = dict.fromkeys(self._groups, 0)
        alone = sum(layer.cost(nothing).parameters for layer in self._layers)
        self._rest = sum(p.numel() for p in model.parameters()) - alone

    def at(self, kept: Mapping[str, int]) -> Cost:
        """Cost when every group keeps so many units."""
        removed = {n: size - kept.get(n, size) for n, size in self._groups.items()}
        costs = [layer.cost(removed) for layer in self._layers]
        return Cost(self._rest + sum(c.parameters for c in costs), sum(c.operations for c in costs))

    def shares(self) -> dict[str, tuple[float, float]]:
        """Group name -> shares of the parameters and multiply-adds that its units carry.

        What two groups carry together, as a layer between them does, counts in both.
        """
        whole, found = self.whole, {}
        for name in self._groups:
            left = self.at({name: 0})
            found[name] = (
                1 - left.parameters / max(1, whole.parameters),
                1 - left.operations / max(1, whole.operations),
            )
        return found

    @property
    def whole(self) -> Cost:
        """Cost of the model as it is."""
        return self.at(self._groups)


def _has_channels(layer: nn.Module) -> bool:
    """It has numbers for every channel, and no multiply-adds are counted."""
    return isinstance(layer, BY_CHANNEL) or response_norm(layer) is not None


def _layer(m: nn.Module, places: int, per_in: dict[str, int], per_out: dict[str, int]) -> _Layer:
    if isinstance(m, NORMS):
        channels = m.num_channels if isinstance(m, nn.GroupNorm) else m.num_features
        return _Layer("norm", 0, channels, 2, 1, bool(m.affine), 0, {}, per_out)
    if isinstance(m, nn.PReLU):
        return _Layer("norm", 0, m.num_parameters, 1, 1, True, 0, {}, per_out)
    if (norm := response_norm(m)) is not None:
        numbers = 1 + (norm.shift is not None)
        return _Layer("norm", 0, norm.channels, numbers, 1, True, 0, {}, per_out)
    bias = m.bias is not None
    if isinstance(m, nn.Linear):
        return _Layer("plain", m.in_features, m.out_features, 1, 1, bias, places, per_in, per_out)
    assert isinstance(m, SPATIAL)
    kernel = m.weight[0, 0].numel()
    kind = "depthwise" if is_depthwise(m) else "plain"
    return _Layer(
        kind, m.in_channels, m.out_channels, kernel, m.groups, bias, places, per_in, per_out
    )


def _places(model: nn.Module, layers: Mapping[str, nn.Module], image: Tensor) -> dict[str, int]:
    found = dict.fromkeys(layers, 0)

    def hook(name: str):  # type: ignore[no-untyped-def]
        def count(layer: nn.Module, inputs: tuple, named: dict[str, Any], out: Tensor) -> None:
            if isinstance(layer, TRANSPOSED):  # at every place of its input
                out = given(inputs, named)
            if not _has_channels(layer):
                width = out.shape[-1 if isinstance(layer, nn.Linear) else 1]
                found[name] += out.numel() // (width * len(image))

        return count

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits(model, image.to(next(model.parameters()).device))
    finally:
        model.train(training)
        for h in handles:
            h.remove()
    return found
