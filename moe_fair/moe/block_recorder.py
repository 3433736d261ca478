"""What passes through one block's experts, and other answers in their place.

Shape legend: T tokens, K top-k, D model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fair.moe.blocks import Forward, MoeBlock


class BlockRecorder:
    """Notes what one block's experts are called with and give. A context manager, again and again.

    Attributes:
        x, index, weights, y: [T, D], [T, K], [T, K], [T, D] of the last call.
    """

    def __init__(self, block: MoeBlock) -> None:
        self.block = block
        self.x: Tensor
        self.index: Tensor
        self.weights: Tensor
        self.y: Tensor
        self._instead: tuple[Tensor, Tensor] | None = None
        self._change: Tensor | None = None
        self._silent = False
        self.stock: Forward
        self._detach: Callable[[], None]

    def __enter__(self) -> BlockRecorder:
        self.stock, self._detach = self.block.attach(self._forward)
        return self

    def __exit__(self, *exception: object) -> None:
        self._instead = self._change = None
        self._silent = False
        self._detach()

    def answering(self, index: Tensor, weights: Tensor) -> BlockRecorder:
        """As a context: the experts run with this routing instead."""
        self._instead = (index, weights)
        return self

    def adding(self, change: Tensor) -> BlockRecorder:
        """As a context: the routed output is changed by this, [T, D]."""
        self._change = change
        return self

    def silent(self) -> BlockRecorder:
        """As a context: what the experts are called with is noted, and they give zeros."""
        self._silent = True
        return self

    def _forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self._instead is not None:
            return self.block.routed_output(self.stock, x, *self._instead)
        if self._change is not None:
            return self.block.routed_output(self.stock, x, index, weights) + self._change
        self.x, self.index, self.weights = x, index, weights
        if self._silent:
            return torch.zeros_like(x)
        self.y = self.block.routed_output(self.stock, x, index, weights)
        return self.y
