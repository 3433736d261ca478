"""A decoder layer's output as the sum of what its MoE block gives and of the rest.

    out = rest + block(x)

What attention does depends on nothing that a repair changes: where this holds, it is run once, and
every fit and every step of training is made with the block alone, on whatever tokens are asked for.

Shape legend: B sequences, L tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_fair.engines.layer_calls import LayerCall
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock

PROBE = 0.1  # a change of the routed output, relative to it, that shows how the layer takes it up


@dataclass(frozen=True)
class LayerSplit:
    """A layer for which it holds; see `split_of`.

    Attributes:
        name: of the argument that the block is given hidden states as; None: by its place.
        more: how many things the block gives beside hidden states; None: these alone, in no tuple.
    """

    layer: nn.Module
    block: nn.Module
    name: str | None
    more: int | None

    def parts(self, call: LayerCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the block and the rest of the layer's output, [B, L, D] both."""
        given: list[Tensor] = []

        def nothing(*arguments: Any, **keywords: Any) -> Any:
            x = keywords[self.name] if self.name is not None else arguments[0]
            given.append(x)
            zeros = torch.zeros_like(x)
            return zeros if self.more is None else (zeros, *[None] * self.more)

        with _in_place_of(self.block, nothing):
            rest = call.run(self.layer, hidden)
        return given[0], rest

    def run(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the block gives of [B, L, D], with other weights of these names if there are any."""
        arguments = () if self.name is not None else (x,)
        keywords = {self.name: x} if self.name is not None else {}
        if weights is None:
            return _first(self.block(*arguments, **keywords))
        return _first(functional_call(self.block, dict(weights), arguments, keywords))


def split_of(
    layer: nn.Module, block: nn.Module, call: LayerCall, hidden: Tensor
) -> LayerSplit | None:
    """The split, where it holds for these hidden states [B, L, D]; None elsewhere.

    It does not where a norm or a factor follows the block, where the block is given more than
    hidden states or serves tokens otherwise beside other tokens.
    """
    if block is layer or "forward" in vars(block):
        return None
    stock, seen = block.forward, list[tuple[tuple[Any, ...], dict[str, Any], Any]]()

    def noting(*arguments: Any, **keywords: Any) -> Any:
        seen.append((arguments, keywords, stock(*arguments, **keywords)))
        return seen[-1][2]

    with _in_place_of(block, noting):
        whole = call.run(layer, hidden)
    if len(seen) != 1 or len(seen[0][0]) + len(seen[0][1]) != 1:
        return None
    [(_, keywords, answer)] = seen
    y = _first(answer)
    more = len(answer) - 1 if isinstance(answer, tuple) else None
    split = LayerSplit(layer, block, next(iter(keywords), None), more)
    if not isinstance(y, Tensor) or y.shape != hidden.shape:
        return None
    x, rest = split.parts(call, hidden)
    near = _near(y)
    if x.shape != y.shape or not near(rest + y, whole, y):
        return None
    some = x.flatten(0, 1)[::2].unsqueeze(0)
    return split if near(split.run(some), y.flatten(0, 1)[::2].unsqueeze(0), y) else None


def _near(y: Tensor) -> Callable[[Tensor, Tensor, Tensor], bool]:
    """Equal up to what float rounding leaves, relative to a third."""
    most = 1e-3 if y.dtype in (torch.float32, torch.float64) else 0.1

    def near(a: Tensor, b: Tensor, size: Tensor) -> bool:
        return bool((a.float() - b.float()).norm() <= most * size.float().norm())

    return near


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _in_place_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    block.forward = forward
    try:
        yield
    finally:
        del block.forward  # the class's own shows again


def uptake(layer: nn.Module, block: MoeBlock, call: LayerCall, hidden: Tensor) -> float | None:
    """c where the layer's output takes up a change δ of the routed output as c·δ; None elsewhere.

    1 in most families, a residual multiplier in some, None behind a norm.
    """
    watch = BlockRecorder(block)
    with watch:
        out = call.run(layer, hidden)
    y = watch.y
    if y.numel() != out.numel():
        return None
    change = PROBE * y.roll(1, 0)
    with watch.adding(change):
        moved = call.run(layer, hidden)
    wide, d = change.double(), (moved.double() - out.double()).view_as(y)
    c = float((wide * d).sum() / wide.square().sum())
    rest = float((d - c * wide).norm() / d.norm())
    # what float rounding of the sum leaves; behind a norm it is of order one
    near = 1e-3 if y.dtype in (torch.float32, torch.float64) else 0.1
    return c if rest < near and c != 0 else None
