"""Where the images are in a layer's input: mostly along its first axis, and one row each.

Not so where windows are cut out of images ([S k, ...]), where two views of them are stacked
([k S, ...], a Siamese net), or where a sequence comes first ([T, S, C]). Which of these it is shows
when one of two images is changed.

Shape legend: S images, k rows of an image, T places of a sequence, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.vision.graph import SPATIAL, logits
from moe_fair.vision.layer_input import given


@dataclass(frozen=True)
class ImageAxis:
    """Attributes:
    axis: of a layer's input along which images are.
    last: images take turns, [k S]; otherwise an image's k rows are neighbours, [S k].
    """

    axis: int = 0
    last: bool = False

    def first(self, x: Tensor, images: int) -> Tensor:
        """[S, k, ...] the input with its images along an axis of their own."""
        x = x.movedim(self.axis, 0)
        if self.last:
            return x.unflatten(0, (-1, images)).transpose(0, 1)
        return x.unflatten(0, (images, -1))

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """[k S, ...] or [S k, ...]: a value of each image for each of its rows."""
        k = rows // len(values)
        if self.last:
            return values.repeat(k, *[1] * (values.dim() - 1))
        return values.repeat_interleave(k, 0) if k > 1 else values


USUAL = ImageAxis()


Shapes = Mapping[str, Sequence[torch.Size]]  # layer -> of its input, in each of its calls


def input_shapes(model: nn.Module, layers: Iterable[str], images: Tensor) -> Shapes:
    """What the layers are given when the model sees these images."""
    return _inputs(model, layers, images, lambda t: t.shape)


def image_axes(
    model: nn.Module, layers: Iterable[str], images: Tensor, shapes: Shapes | None = None
) -> dict[str, ImageAxis]:
    """Of the layers whose images are not along the first axis, one row each, where they are.

    Args:
        images: two or more, of which two are looked at.
        shapes: `input_shapes` of two images, where they are known.

    Raises:
        ValueError: an input in which they are in no order that is known here.
    """
    layers = list(layers)
    x = images[:2].clone()
    shapes = shapes or input_shapes(model, layers, x)
    layers = [n for n, calls in shapes.items() if not all(_plain(model, n, c) for c in calls)]
    if not layers:
        return {}
    before = _inputs(model, layers, x, Tensor.clone)
    x[1] = x[1].flip(-1) + torch.linspace(0.1, 0.9, x.shape[-1], device=x.device, dtype=x.dtype)
    found = {}
    after = _inputs(model, layers, x, Tensor.clone)
    for name, calls in after.items():
        axes = {
            _axis(a, b, 1 if isinstance(model.get_submodule(name), SPATIAL) else -1)
            for a, b in zip(before[name], calls, strict=False)
        }
        if len(axes) != 1 or None in axes:
            raise ValueError(
                f"{name} is given its images in an order of its own, so nothing can be scored "
                "there for each of them; take scores of weights, as --removal l1 --allocate uniform"
            )
        [axis] = axes
        if axis != USUAL:
            assert axis is not None
            found[name] = axis
    return found


def _inputs(
    model: nn.Module, layers: Iterable[str], x: Tensor, take: Callable[[Tensor], Any]
) -> dict[str, list[Any]]:
    """Layer -> what is taken of its input in each of its calls."""
    found: dict[str, list[Any]] = {n: [] for n in layers}

    def look(name: str):  # type: ignore[no-untyped-def]
        return lambda _, inputs, named: found[name].append(take(given(inputs, named)))

    handles = [
        model.get_submodule(n).register_forward_pre_hook(look(n), with_kwargs=True) for n in found
    ]
    try:
        with torch.no_grad():
            logits(model, x)
    finally:
        for h in handles:
            h.remove()
    return found


def _plain(model: nn.Module, name: str, shape: torch.Size) -> bool:
    """Two rows, and no other axis for images that has two."""
    others = () if isinstance(model.get_submodule(name), SPATIAL) else shape[1:-1]
    return shape[0] == 2 and 2 not in others


def _axis(a: Tensor, b: Tensor, channels: int) -> ImageAxis | None:
    """Where the second of two images is, by what changed when it did; None: nowhere."""
    changed = a != b
    over = range(1) if channels == 1 else range(a.dim() - 1)
    for axis in over:
        rows = changed.movedim(axis, 0).flatten(1).any(1)
        if len(rows) % 2:
            continue
        for last in (False, True):
            first = rows[::2] if last else rows[: len(rows) // 2]
            if not bool(first.any()):
                return ImageAxis(axis, last)
    return None
