"""The unified family of output norms (arXiv 2606.15716).

    S_e = Σ_t g_e^a · ‖f_e(x_t)‖₂^p, divided by the number of routed tokens where the rule is a mean

with (a, mean, p): EAN (0, no, 1); REAP (1, yes, 1), arXiv 2510.13999; MAN (0, yes, 1); MSAN
(0, yes, 2). g is the weight that the model applies, renormalised over the top k exactly where the
model's own forward renormalises it.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion, mean_over_tokens
from moe_fair.core.units import GroupView


def ean(view: GroupView) -> Tensor:
    """[N] Σ_t ‖f‖."""
    return view["norm"]


def reap(view: GroupView) -> Tensor:
    """[N] mean of g‖f‖ over routed tokens."""
    return mean_over_tokens(view["gated_norm"], view["tokens"])


def man(view: GroupView) -> Tensor:
    """[N] mean of ‖f‖ over routed tokens."""
    return mean_over_tokens(view["norm"], view["tokens"])


def msan(view: GroupView) -> Tensor:
    """[N] mean of ‖f‖² over routed tokens."""
    return mean_over_tokens(view["norm_sq"], view["tokens"])


criteria = (
    Criterion("ean", ("norm",), "baseline of arXiv 2510.13999", ean),
    Criterion("reap", ("gated_norm", "tokens"), "arXiv 2510.13999", reap),
    Criterion("man", ("norm", "tokens"), "arXiv 2606.15716", man),
    Criterion("msan", ("norm_sq", "tokens"), "arXiv 2606.15716", msan),
)
