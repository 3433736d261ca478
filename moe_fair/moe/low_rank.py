"""A weight that is trained as a small change: of low rank where it is a matrix (or one per expert).

    W = W⁰ + B A,    A: [..., r, I] random,    B: [..., O, r] zero at first      (arXiv 2106.09685)

The change is folded in at every step, so that what runs is what will be written. With G the
gradient of W, those of the factors are Bᵀ G and G Aᵀ: G is there for one weight at a time. Routers,
norms and biases are no matrices that a low rank would stand for, and change as a whole.

Shape legend: r rank, O outputs, I inputs.
"""

from __future__ import annotations

from weakref import WeakMethod

import torch
from torch import Tensor, nn

RANK = 8


class SmallChange:
    """What is trained of one weight.

    Args:
        weight: of the model; its gradient is taken over, and dropped.
        stored: the type in which it will be written.
        whole: it changes as a whole, whatever its shape.

    Attributes:
        trained: float32 tensors, with `grad`.
        sizes: about how large each is, or will be: steps are relative to that.
    """

    def __init__(
        self, weight: nn.Parameter, stored: torch.dtype, order: torch.Generator, whole: bool
    ) -> None:
        self.weight, self.stored = weight, stored
        self.first = weight.detach().to(stored, copy=True)
        size = max(float(weight.detach().float().square().mean().sqrt()), 1e-8)
        shape = tuple(weight.shape)
        if whole or len(shape) < 2 or min(shape[-2:]) <= 2 * RANK:
            self.trained, self.sizes = [torch.zeros(shape)], [size]
        else:
            a = torch.randn(*shape[:-2], RANK, shape[-1], generator=order) * RANK**-0.5
            self.trained = [a, torch.zeros(*shape[:-1], RANK)]
            self.sizes = [RANK**-0.5, size]
        self.trained = [t.to(weight.device) for t in self.trained]
        self._begun = [t.clone() for t in self.trained]
        weight.requires_grad_(True)
        # weakly: a hook that holds what holds its weight is unseen by the search for garbage
        take = WeakMethod(self._take)
        weight.register_post_accumulate_grad_hook(lambda w: take()(w))  # type: ignore[misc]

    def begin_again(self) -> None:
        """Nothing is changed yet."""
        for t, begun in zip(self.trained, self._begun, strict=True):
            t.copy_(begun)

    def clear(self) -> None:
        """Gradients of zero."""
        self.weight.grad = None
        for t in self.trained:
            t.grad = torch.zeros_like(t)

    @torch.no_grad()
    def _take(self, weight: Tensor) -> None:
        """The gradient that the weight has got, as those of what is trained."""
        gradient = weight.grad
        assert gradient is not None
        weight.grad = None
        gradient = gradient.float()
        if len(self.trained) == 1:
            found = [gradient]
        else:
            a, b = self.trained
            found = [b.mT @ gradient, gradient @ a.mT]
        for t, g in zip(self.trained, found, strict=True):
            assert t.grad is not None
            t.grad += g

    @torch.no_grad()
    def value(self) -> Tensor:
        """The weight as it will be written."""
        change = self.trained[0]
        if len(self.trained) == 2:
            change = self.trained[1] @ change
        return (self.first.float() + change).to(self.stored)

    @torch.no_grad()
    def put(self, value: Tensor | None = None) -> None:
        """The model runs with this value, by default the one that is trained."""
        self.weight.copy_(self.value() if value is None else value)
