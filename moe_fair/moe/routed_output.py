"""The routed output as a linear map of the experts' hidden activations, and its adjoint.

    y(t) = Σ_s g_s(t) · h_{e_s}(x_t) W_{e_s},     h_e(x) = act(gate)·up, with a 1 appended where the
                                                  experts' down projection has a bias

W is what repairs change. Nothing larger than the activations of one layer is held.

Shape legend: T tokens, K top-k, E experts, F hidden (one more with a bias), D model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2**32  # of hidden activations, and of Gram matrices; what is more is computed again


class RoutedOutput:
    """Some tokens' way through the experts of one layer.

    Args:
        experts: a module under the contract of `use_experts_implementation`.
        x, ids, weights: [T, D], [T, K], [T, K], what it is called with.
        keep: what is small enough of what is computed, for as often as it is asked for.

    Raises:
        ValueError: the output is not linear in the down projection.
    """

    def __init__(
        self, experts: Any, x: Tensor, ids: Tensor, weights: Tensor, *, keep: bool = True
    ) -> None:
        check_linear(experts)
        self.experts, self.x = experts, x
        self.precise = torch.promote_types(x.dtype, torch.float32)
        k = ids.shape[1]
        flat = ids.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=int(experts.num_experts)).tolist()
        self._tokens = list(order.div(k, rounding_mode="floor").split(counts))
        self._gates = list(weights.flatten()[order].to(self.precise).split(counts))
        down = experts.down_proj  # [E, F, D] or [E, D, F]
        width = down.shape[1 if experts.is_transposed else 2]
        small = keep and flat.numel() * width * x.itemsize <= KEPT_BYTES
        self._kept = [self._hidden(e) for e in range(len(counts))] if small else None
        few = keep and down.shape[0] * width**2 * self.precise.itemsize <= KEPT_BYTES
        self._own_grams: list[Tensor] | None = [] if few else None
        self._halves: tuple[RoutedOutput, RoutedOutput] | None = None

    def split(self, at: int) -> tuple[RoutedOutput, RoutedOutput]:
        """The first `at` tokens and the rest, each by itself; nothing is held or computed twice.

        What is a sum over tokens is from then on that of the two.
        """
        first, rest = copy.copy(self), copy.copy(self)
        # of every expert the tokens rise
        counts = [int(n) for n in torch.stack([(t < at).sum() for t in self._tokens]).tolist()]
        for half, part in ((first, slice(None, at)), (rest, slice(at, None))):
            cut = [slice(None, n) if half is first else slice(n, None) for n in counts]
            half.x = self.x[part]
            half._tokens = [t[c] for t, c in zip(self._tokens, cut, strict=True)]
            half._gates = [g[c] for g, c in zip(self._gates, cut, strict=True)]
            if self._kept is not None:
                half._kept = [h[c] for h, c in zip(self._kept, cut, strict=True)]
            half._own_grams = None if self._own_grams is None else []
        rest._tokens = [t - at for t in rest._tokens]
        self._halves = (first, rest)
        return self._halves

    def features(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For every expert: its tokens [n] and g·h [n, F]."""
        for e, tokens in enumerate(self._tokens):
            h = self._kept[e] if self._kept is not None else self._hidden(e)
            h = h.to(self.precise)
            if self.experts.has_bias:
                h = torch.cat([h, h.new_ones(len(h), 1)], 1)
            yield tokens, h * self._gates[e].unsqueeze(1)

    def own_grams(self) -> Iterator[Tensor]:
        """For every expert: Σ g²·h hᵀ [F, F] over its own tokens; kept where they are small."""
        if self._own_grams:
            yield from self._own_grams
            return
        if self._halves is not None and self._own_grams is not None:
            for a, b in zip(*(h.own_grams() for h in self._halves), strict=True):
                yield a + b
            return
        for _, h in self.features():
            gram = h.T @ h
            if self._own_grams is not None:
                self._own_grams.append(gram)
            yield gram

    def output(self, w: Tensor) -> Tensor:
        """[T, D] with down projections `w` [E, F, D]."""
        y = self.x.new_zeros(len(self.x), w.shape[2], dtype=w.dtype)
        for (tokens, h), matrix in zip(self.features(), w, strict=True):
            y.index_add_(0, tokens, h @ matrix)
        return y

    def adjoint(self, r: Tensor) -> Tensor:
        """[E, F, D] from [T, D]: the transpose of `output`."""
        return torch.stack([h.T @ r[tokens] for tokens, h in self.features()])

    @cached_property
    def gram(self) -> Tensor:
        """[E·F, E·F] float64, `adjoint ∘ output` as a matrix: only tokens that share two experts
        count between them. For few and narrow experts."""
        if self._halves is not None:
            return self._halves[0].gram + self._halves[1].gram
        every = list(self.features())
        size, width = len(every), every[0][1].shape[1]
        g = self.x.new_zeros(size, width, size, width, dtype=torch.float64)
        row = torch.full((len(self.x),), -1, device=self.x.device)
        for e, (tokens, h) in enumerate(every):
            row.fill_(-1)
            row[tokens] = torch.arange(len(tokens), device=row.device)
            for other in range(e, size):
                shared, h_other = every[other]
                at = row[shared]
                both = at >= 0
                g[e, :, other] = (h[at[both]].T @ h_other[both]).double()
                g[other, :, e] = g[e, :, other].T
        return g.view(size * width, size * width)

    def squares(self) -> Tensor:
        """[E, F] Σ (g·h)²: the diagonal of `adjoint ∘ output`, the same for every column."""
        if self._halves is not None:
            return self._halves[0].squares() + self._halves[1].squares()
        return torch.stack([h.square().sum(0) for _, h in self.features()])

    def _hidden(self, e: int) -> Tensor:
        """[n, F] in the experts' own data type, in which they were computed."""
        return hidden(self.experts, e, self.x[self._tokens[e]])


def check_linear(experts: Any) -> None:
    """The experts' output is linear in their down projection.

    Raises:
        ValueError: a norm follows it, or the module does not follow the contract.
    """
    known = all(hasattr(experts, a) for a in ("_apply_gate", "has_gate", "is_transposed"))
    if not known or not hasattr(experts, "down_proj") or experts.has_post_expert_norm:
        raise ValueError(
            f"{type(experts).__name__}: its output is not a linear map of down_proj, so it cannot "
            "be repaired; use --repair none"
        )


def hidden(experts: Any, e: int, x: Tensor) -> Tensor:
    """Expert e's gated hidden activations [n, F] of x [n, D]."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    w = getattr(experts, name)[e]
    z = x @ (w if experts.is_transposed else w.T)
    if experts.has_bias:
        z = z + getattr(experts, name + "_bias")[e]
    return experts._apply_gate(z) if experts.has_gate else experts.act_fn(z)


def read_down(experts: Any, some: slice = slice(None)) -> Tensor:
    """[E, F, D] down projections in float32 at least, the bias as the last row of each.

    Args:
        some: of these experts.
    """
    w = experts.down_proj.detach()[some]
    w = w if experts.is_transposed else w.transpose(1, 2)
    if experts.has_bias:
        w = torch.cat([w, experts.down_proj_bias.detach()[some].unsqueeze(1)], 1)
    return w.to(torch.promote_types(w.dtype, torch.float32)).contiguous()


@torch.no_grad()
def write_down(experts: Any, w: Tensor) -> None:
    """Put [E, F, D] back, in the module's own data type and layout."""
    if experts.has_bias:
        experts.down_proj_bias.copy_(w[:, -1])
        w = w[:, :-1]
    experts.down_proj.copy_(w if experts.is_transposed else w.transpose(1, 2))
