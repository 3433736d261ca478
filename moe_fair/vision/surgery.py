"""Cutting exact channels out of layers, and doing it again from the record.

A *cut* says for one side of one layer which positions leave: `(module, "in" | "out", ids)`, or
which heads an attention no longer counts: `(module, "heads", ids)`; of a response normalisation
which channels leave: `(module, "norm", ids)`. The cuts of a plan name
positions of the model before the plan, so their order does not matter; a history is a list of such
steps, one for each time that the model was pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_fair.vision.fused import cut_heads
from moe_fair.vision.graph import (
    CHANNEL_NORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    ChannelGroup,
    is_depthwise,
)
from moe_fair.vision.response_norm import cut_response_norm, response_norm

Cut = tuple[str, str, list[int]]
SIDES = ("in", "out", "heads", "norm")


def cuts_of(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> list[Cut]:
    """The cuts that leave only the kept units, in the order of the groups' layers.

    Raises:
        ValueError: kept ids that a group does not have, or none.
    """
    gone: dict[tuple[str, str], list[int]] = {}
    for g in groups:
        ids = set(kept.get(g.name, range(g.units.size)))
        if not ids or not ids <= set(range(g.units.size)):
            raise ValueError(f"{g.name}: kept ids must be one or more of 0..{g.units.size - 1}")
        for m in g.members:
            at = gone.setdefault((m.module, m.side), [])
            at.extend(i for unit, row in enumerate(m.index) if unit not in ids for i in row)
    return [(module, side, sorted(ids)) for (module, side), ids in gone.items() if ids]


def cut(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Take the positions out of the model's layers, in place.

    Raises:
        ValueError: a cut does not fit its layer.
    """
    for module, side, ids in cuts:
        try:
            layer = model.get_submodule(module)
        except AttributeError:
            raise ValueError(f"the model has no layer {module!r}: the cuts are another's") from None
        if side not in SIDES:
            raise ValueError(f"{module}: a cut is on side {', '.join(SIDES)}, not {side!r}")
        if side == "heads":
            cut_heads(layer, module, ids)
        elif side == "norm":
            if (norm := response_norm(layer)) is None:
                raise ValueError(f"{module}: {type(layer).__name__} is no response normalisation")
            cut_response_norm(layer, norm, _kept(module, norm.channels, ids))
        elif isinstance(layer, CHANNEL_NORMS):
            _cut_channel_norm(layer, _kept(module, layer.num_features, ids))
        elif isinstance(layer, nn.GroupNorm):
            _cut_group_norm(layer, module, _kept(module, layer.num_channels, ids))
        elif isinstance(layer, nn.PReLU):
            kept = _kept(module, layer.num_parameters, ids)
            _take(layer, "weight", kept, 0)
            layer.num_parameters = len(kept)
        elif isinstance(layer, TRANSPOSED):
            _cut_transposed(layer, module, side, ids)
        elif isinstance(layer, CONVOLUTIONS):
            _cut_convolution(layer, module, side, ids)
        elif isinstance(layer, nn.Linear):
            _cut_linear(layer, module, side, ids)
        else:
            raise ValueError(f"{module}: {type(layer).__name__} cannot be cut")


def _kept(module: str, size: int, ids: Sequence[int]) -> Tensor:
    gone = set(ids)
    if not gone <= set(range(size)) or len(gone) == size:
        raise ValueError(f"{module}: cannot take {len(gone)} positions out of its {size}")
    return torch.tensor([i for i in range(size) if i not in gone])


def _take(layer: nn.Module, name: str, kept: Tensor, axis: int) -> None:
    """Replace a parameter or buffer by its kept slices."""
    old = getattr(layer, name)
    if old is None:
        return
    new = old.detach().index_select(axis, kept.to(old.device)).clone()
    if isinstance(old, nn.Parameter):
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(layer, name, new)


def _cut_channel_norm(layer: nn.Module, kept: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _take(layer, name, kept, 0)
    layer.num_features = len(kept)  # type: ignore[assignment]


def _cut_group_norm(layer: nn.GroupNorm, module: str, kept: Tensor) -> None:
    width = layer.num_channels // layer.num_groups
    counts = torch.bincount(kept // width)
    if not bool(((counts == 0) | (counts == width)).all()):
        raise ValueError(f"{module}: a part of what it normalises together would leave")
    for name in ("weight", "bias"):
        _take(layer, name, kept, 0)
    layer.num_channels, layer.num_groups = len(kept), len(kept) // width


def _cut_transposed(layer: nn.Module, module: str, side: str, ids: Sequence[int]) -> None:
    """A transposed convolution of one group: its weight is [in, out, ...]."""
    if layer.groups != 1:
        raise ValueError(f"{module}: {type(layer).__name__} in groups cannot be cut")
    kept = _kept(module, int(getattr(layer, f"{side}_channels")), ids)
    _take(layer, "weight", kept, 1 if side == "out" else 0)
    if side == "out":
        _take(layer, "bias", kept, 0)
    setattr(layer, f"{side}_channels", len(kept))


def _cut_linear(layer: nn.Linear, module: str, side: str, ids: Sequence[int]) -> None:
    if side == "out":
        kept = _kept(module, layer.out_features, ids)
        _take(layer, "weight", kept, 0)
        _take(layer, "bias", kept, 0)
        layer.out_features = len(kept)
    else:
        kept = _kept(module, layer.in_features, ids)
        _take(layer, "weight", kept, 1)
        layer.in_features = len(kept)


def _cut_convolution(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, module: str, side: str, ids: Sequence[int]
) -> None:
    depthwise = is_depthwise(layer)
    if side == "out":
        kept = _kept(module, layer.out_channels, ids)
        _check_even(layer, module, kept, layer.out_channels)
        _take(layer, "weight", kept, 0)
        _take(layer, "bias", kept, 0)
        layer.out_channels = len(kept)
        if depthwise:
            layer.in_channels = layer.groups = len(kept)
        return
    kept = _kept(module, layer.in_channels, ids)
    _check_even(layer, module, kept, layer.in_channels)
    if layer.groups == 1:
        _take(layer, "weight", kept, 1)
    else:
        # each group keeps its own inputs: the rows of a group's outputs take that group's columns
        width, rows = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        columns = kept.reshape(layer.groups, -1) % width
        old = layer.weight.detach()
        parts = [
            old[g * rows : (g + 1) * rows].index_select(1, columns[g].to(old.device))
            for g in range(layer.groups)
        ]
        layer.weight = nn.Parameter(torch.cat(parts), requires_grad=layer.weight.requires_grad)
    layer.in_channels = len(kept)


def _check_even(layer: nn.Module, module: str, kept: Tensor, size: int) -> None:
    """Every group of a grouped convolution keeps as many channels as the others."""
    parts = int(layer.groups)  # type: ignore[arg-type]
    if parts == 1 or is_depthwise(layer):
        return
    counts = torch.bincount(kept // (size // parts), minlength=parts)
    if len(counts.unique()) != 1:
        raise ValueError(f"{module}: its {parts} groups would keep unequal numbers of channels")
