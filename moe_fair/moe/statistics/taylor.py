"""Gate Taylor values t_e = g · ∂ℓ/∂g of each token, ℓ the mean loss of its sequence.

What the loss changes by to first order when the expert's output is taken out: Σ t is also
Σ w · ∂ℓ/∂w over the expert's down projection (docs/methods.md, section 6). FAIR-Pruner's R (arXiv
2508.02291); the rows, one a sequence, are the minibatch form of Molchanov et al.
(arXiv 1906.10771).
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.moe.statistic import Pass, Statistic

name = "taylor"
collected = "usual"
names = {
    "taylor": Statistic("E", "Σ t", needs_backward=True),
    "taylor_abs": Statistic("E", "Σ |t|", needs_backward=True),
    "taylor_sq": Statistic("E", "Σ t²", needs_backward=True),
    "rows": Statistic("B E", "Σ t over each sequence", needs_backward=True, kind="row"),
}


def backward(seen: Pass) -> dict[str, Tensor]:
    """[E] each, and [B, E]."""
    t = seen.gradient.flatten().double() * seen.g
    values = {"taylor": t, "taylor_abs": t.abs(), "taylor_sq": t.square()}
    return seen.per_expert(values) | {"rows": seen.per_sequence(t)}
