"""MoNE's novice, as far as it folds: the mean of what is missing goes into the experts' bias.

    c = argmin Σ_t ‖y(t) - y'(t) - s(t) c‖²  =  Σ_t s (y - y') / Σ_t s²,    s(t) = Σ_e g_e(t)

and c is added to the down projection's bias of every remaining expert, so that the layer's output
grows by s(t) c: the same constant for every token where the router weights sum to one.

After MoNE (arXiv 2507.00390), which replaces each pruned expert by a constant of its own, its mean
output, and keeps its router row. That has no place in a stock checkpoint, where all experts of a
layer have matrices of one size and a row leads to an expert; and without a bias not even the mean
of all constants has one, since no input of the remaining matrices is constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fair.moe.routed_output import RoutedOutput, read_down

name = "novice"
ridges = (0.0,)


def check(experts: Any) -> None:
    """There is a bias to fold into.

    Raises:
        ValueError: there is none.
    """
    if not experts.has_bias:
        raise ValueError(
            f"{type(experts).__name__}: its down projections have no bias that a constant could be "
            "folded into; use --repair scale, channel, refit or distill"
        )


def fit(routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
    """[E, F, D]; the last of the F rows is the bias."""
    w = read_down(routed.experts)
    missing = target.double() - routed.output(w).double()
    share = torch.zeros(len(missing), dtype=torch.float64, device=missing.device)
    for tokens, h in routed.features():
        share.index_add_(0, tokens, h[:, -1].double())  # g · 1
    constant = (share @ missing) / share.square().sum().clamp(min=1e-300)
    w[:, -1] += constant.to(w.dtype)
    return w
