"""What comes to the down projections of a layer's experts, by which they are rounded in turn.

    W'_e = W_e - ((H_e + λ)⁻¹ h_eᵀ r)ᵀ,     r = what the projections before e lost on e's tokens

Tokens go to several experts, so each projection can make good some of what those before it lost.

Shape legend: T tokens, n tokens of one expert, F hidden, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.engines.packing.feedback import DAMPING
from moe_fair.moe.routed_output import RoutedOutput


class DownInputs:
    """Tokens' hidden activations, and what rounding has lost so far.

    Args:
        routed: of experts whose other matrices are as they will be stored.
    """

    def __init__(self, routed: RoutedOutput) -> None:
        self._routed = routed
        self._lost: Tensor | None = None  # [T, D]

    def wanted(self, e: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """What an expert's projection [D, F] should be rounded to, and H_e [F, F]."""
        tokens, h = self._routed.gated(e)
        gram = h.T @ h
        if self._lost is not None and len(tokens):
            damping = DAMPING * gram.diagonal().mean()
            damped = gram + damping * torch.eye(len(gram), device=gram.device)
            factor, wrong = torch.linalg.cholesky_ex(damped)
            if not wrong:
                makes_good = torch.cholesky_solve(h.T @ self._lost[tokens], factor)
                values = values - makes_good.T.to(values)
        return values, gram.to(values.device)

    def lose(self, e: int, change: Tensor) -> None:
        """An expert's projection is off by this, [D, F]."""
        tokens, h = self._routed.gated(e)
        if self._lost is None:
            self._lost = h.new_zeros(len(self._routed.x), len(change))
        self._lost.index_add_(0, tokens, h @ change.to(h).T)
