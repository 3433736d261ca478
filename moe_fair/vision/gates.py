"""Gates on units: one number per image and unit that multiplies the unit wherever it is read.

A unit's output as its consumers see it stands after batch normalisation, activation, pooling and
residual addition. The gate multiplies there, at the input of every consumer, so a gate of 0 is the
model with the unit removed, exactly; and the gradient with respect to a gate of 1 is Σ a·∂L/∂a over
all places where the unit is read, the gate form of Molchanov et al. (arXiv 1906.10771).

A response normalisation before the consumer would still count the unit in its mean, so the gate
multiplies its input too, without a gradient there: of what the unit does to others the score knows
nothing.

Shape legend: S images, N units of all groups, C input channels of a consumer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.vision.graph import SPATIAL, ChannelGroup
from moe_fair.vision.image_axis import USUAL, ImageAxis
from moe_fair.vision.layer_input import given, with_input
from moe_fair.vision.response_norm import response_norm


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's input, and of its output, along which channels lie."""
    if isinstance(layer, SPATIAL):
        return -layer.weight.dim() + 1
    norm = response_norm(layer)
    return -1 if norm is None else norm.axis


def _channels(layer: nn.Module) -> int:
    """Channels of a layer's input."""
    if (norm := response_norm(layer)) is not None:
        return norm.channels
    return int(getattr(layer, "in_channels" if isinstance(layer, SPATIAL) else "in_features"))


class Gates:
    """Multiplies the units of the groups by `values` while the context is open.

    Attributes:
        values: [S, N + 1] or [1, N + 1]; the last column belongs to channels outside all groups and
            stays 1. Set it before each forward.
        offsets: group name -> where its units start in `values`.

    Args:
        axes: where the images are in the inputs of layers that have them elsewhere than usual;
            needed for values of more than one row.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        axes: Mapping[str, ImageAxis] | None = None,
    ) -> None:
        self._axes = axes or {}
        self.total = sum(g.units.size for g in groups)
        self.values = torch.ones(1, self.total + 1)
        self._ones: Tensor | None = None  # `values`, where they are known to be that
        self.offsets: dict[str, int] = {}
        self._model = model
        self._maps: dict[str, Tensor] = {}
        at = 0
        for g in groups:
            self.offsets[g.name] = at
            for m in (*g.consumers, *g.norms):
                if m.module not in self._maps:
                    channels = _channels(model.get_submodule(m.module))
                    self._maps[m.module] = torch.full((channels,), self.total)
                units = torch.arange(at, at + g.units.size)
                self._maps[m.module][torch.tensor(m.index)] = units[:, None]
            at += g.units.size
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Gates:
        for name, places in self._maps.items():
            layer = self._model.get_submodule(name)
            self._handles.append(
                layer.register_forward_pre_hook(self._hook(name, layer, places), with_kwargs=True)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def open(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Set every gate to 1, for gradients with respect to `values` alone, [rows, N + 1]."""
        self.values = torch.ones(rows, self.total + 1, dtype=dtype, device=device)
        self._ones = self.values.requires_grad_(True)

    def close(self, kept: dict[str, Sequence[int]], groups: Sequence[ChannelGroup]) -> None:
        """Set every gate to 1 for kept units and 0 for the others."""
        self.values = torch.ones(1, self.total + 1)
        for g in groups:
            gone = sorted(set(range(g.units.size)) - set(kept[g.name]))
            self.values[0, [self.offsets[g.name] + i for i in gone]] = 0

    def _hook(self, name: str, layer: nn.Module, places: Tensor):  # type: ignore[no-untyped-def]
        channels = channel_axis(layer)
        where = self._axes.get(name, USUAL)
        scored = response_norm(layer) is None

        def gate(_: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
            x = given(inputs, named)
            values = self.values if scored else self.values.detach()
            z = values.to(x.device, x.dtype).index_select(1, places.to(x.device))
            shape = [1] * x.dim()
            shape[channels] = z.shape[1]
            if len(z) > 1:
                shape[where.axis] = x.shape[where.axis]
                z = where.spread(z, x.shape[where.axis])
            z = z.reshape(shape)
            x = _Open.apply(x, z) if self.values is self._ones else x * z
            return with_input(inputs, named, x)

        return gate


class _Open(torch.autograd.Function):
    """Gates that are all 1, for which only gradients are asked: the numbers of `x * z` without a
    product forward and one of two backward, a tenth of a ResNet's scoring on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape = z.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None]:
        [x], [slope] = ctx.saved_tensors, slopes
        asked = ctx.needs_input_grad[1]
        return slope, (slope * x).sum_to_size(ctx.shape) if asked else None
