"""The model's own router with some experts' logits at minus infinity: pruning without cutting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_fair.moe.blocks import MoeBlock, find_blocks


@contextmanager
def masked(model: Any, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, every router sees -inf for the experts that are not kept.

    The router's own code runs; only what its linear map gives, and its correction bias, are masked.
    """
    with ExitStack() as stack:
        for block in find_blocks(model):
            if block.name in kept:
                stack.enter_context(_masked_block(block, kept[block.name]))
        yield


@contextmanager
def _masked_block(block: MoeBlock, kept: Sequence[int]) -> Iterator[None]:
    size = block.num_experts
    gone = torch.ones(size, dtype=torch.bool)
    gone[list(kept)] = False
    linear, stock = F.linear, block.router.forward

    def hide(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = linear(x, w, b)
        return y.masked_fill(gone, float("-inf")) if y.shape[-1] == size else y

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.nn.functional, "linear", hide):
            return stock(*args, **kwargs)

    # sigmoid(-inf) = 0, so a correction bias alone would choose
    biases = [getattr(m, t) for m, t, _ in block.routed if "bias" in t]
    saved = [b.detach().clone() for b in biases]
    block.router.forward = forward
    with torch.no_grad():
        for b in biases:
            b.view(-1)[gone] = float("-inf")
    try:
        yield
    finally:
        del block.router.forward
        with torch.no_grad():
            for b, s in zip(biases, saved, strict=True):
                b.copy_(s)
