"""What the loss and the layer's output would be with the expert alone removed (METHODS §6).

With y₋ₑ the layer's output after e has left, its tokens sent to the next best expert and the router
weighing again, Δ_e(t) = y₋ₑ(t) − y(t), ℓ the summed loss of a sequence and
δ_t = ⟨∂ℓ/∂y_t, Δ_e(t)⟩, per calibration token

    reconstruction         Σ_t ‖Δ_e(t)‖²
    counterfactual-first   Σ_t δ_t
    counterfactual         Σ_t (δ_t + ½ δ_t²)     second order: the empirical Fisher, diagonal over
                                                 tokens, in place of the Hessian

`counterfactual` estimates the increase of the loss per token, so that layers can be compared.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def reconstruction(view: GroupView) -> Tensor:
    """[N] mean ‖Δ‖² over tokens."""
    return view["removed_error"] / view.total_tokens


def first_order(view: GroupView) -> Tensor:
    """[N] mean δ over tokens; signed."""
    return view["removed_first"] / view.total_tokens


def second_order(view: GroupView) -> Tensor:
    """[N] mean δ + ½ δ² over tokens."""
    return (view["removed_first"] + 0.5 * view["removed_second"]) / view.total_tokens


criteria = (
    Criterion(
        "reconstruction", ("removed_error",), "single removals of NAEE, arXiv 2402.14800",
        reconstruction,
    ),
    Criterion("counterfactual-first", ("removed_first",), "this project", first_order),
    Criterion(
        "counterfactual", ("removed_first", "removed_second"), "this project", second_order
    ),
)  # fmt: skip
