"""What the loss and the layer's output would be with the expert alone removed (METHODS §6).

With y₋ₑ the layer's output after e has left, its tokens sent to the next best expert and the router
weighing again, Δ_e(t) = y₋ₑ(t) − y(t), ℓ the summed loss of a sequence and
δ_e(t) = ⟨∂ℓ/∂y_t, Δ_e(t)⟩, per calibration token

    reconstruction         Σ_t ‖Δ_e(t)‖²
    counterfactual-first   Σ_t δ_e
    counterfactual         Σ_t (δ_e + ½ δ_e²)    second order: the empirical Fisher, diagonal over
                                                tokens, in place of the Hessian
    counterfactual-fisher  Σ_t ½ δ_e²            its positive part; the signed first order is noise
                                                at the few tokens of a calibration set
    counterfactual-set     what ½ Σ_{e,f∈S} C_ef grows by as a set S is taken out greedily, with
                           C_ef = Σ_t δ_e δ_f, and 0 in place of what is negative between two

The last one knows that experts may be spared singly and not together: experts that stand in for one
another have δ of one sign on the same tokens. Where two δ cancel it gives no credit: deep cuts
change too much for that to come true. All of them but the first estimate an increase of the loss
per token, so that layers can be compared.

Shape legend: N experts of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.greedy import greedy
from moe_fair.core.units import GroupView


def reconstruction(view: GroupView) -> Tensor:
    """[N] mean ‖Δ‖² over tokens."""
    return view["removed_error"] / view.total_tokens


def first_order(view: GroupView) -> Tensor:
    """[N] mean δ over tokens; signed."""
    return view["removed_first"] / view.total_tokens


def fisher(view: GroupView) -> Tensor:
    """[N] mean ½ δ² over tokens."""
    return 0.5 * view["removed_gram"].diagonal() / view.total_tokens


def second_order(view: GroupView) -> Tensor:
    """[N] mean δ + ½ δ² over tokens."""
    return first_order(view) + fisher(view)


def set_score(view: GroupView) -> Tensor:
    """[N] what each expert adds when its turn comes."""
    gram = 0.5 * (view["removed_gram"] / view.total_tokens).clamp(min=0)
    order, added = greedy(gram.numpy(), view.group.blocks)
    score = torch.zeros(len(order), dtype=torch.float64)
    score[order] = torch.tensor(added, dtype=torch.float64)
    return score


criteria = (
    Criterion(
        "reconstruction", ("removed_error",), "single removals of NAEE, arXiv 2402.14800",
        reconstruction,
    ),
    Criterion("counterfactual-first", ("removed_first",), "this project", first_order),
    Criterion("counterfactual", ("removed_first", "removed_gram"), "this project", second_order),
    Criterion("counterfactual-fisher", ("removed_gram",), "this project", fisher),
    Criterion("counterfactual-set", ("removed_gram",), "this project", set_score),
)  # fmt: skip
