"""What the loss and the layer's output would be with the expert alone removed.

See docs/methods.md, section 6.
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
    counterfactual-agreed  the same, and Σ_t δ_e as far as the calibration text agrees on it
    counterfactual-measured  of each expert alone: the loss change measured on a share of the text

The set knows that experts may be spared singly and not together: experts that stand in for one
another have δ of one sign on the same tokens. Where two δ cancel it gives no credit: deep cuts
change too much for that to come true. The first order would be all that matters, were it known:
most of it is what the few tokens of a calibration set happen to say. `counterfactual-agreed` takes
it times max(0, 1 - 2 s²/m²), a shrinkage of James and Stein's form, with m its mean and s the
standard error of m: the larger of that between sequences and that between domains. The 2 is that of
Akaike's and Mallows' criteria; with 1, little text does harm (eval/LAB.md). All of them but
`reconstruction` estimate an increase of the loss per token, so that layers can be compared.

Where an expert's removal changes much, no expansion around the whole model holds: in a first layer
without shared experts ½ δ² can be a quarter of the truth. `counterfactual-measured` removes every
expert alone on a small share S of the calibration text and measures κ, what the loss rises by
beyond the first order there: that is known, and an accident of S. A layer's Σ κ over its Σ ½ δ² on
S scales ½ δ² of the whole text to the layer's truth, and the score is the mean of this and κ, plus
the first order of the whole text as far as it is agreed on. Weights by the spread of κ between
domains did worse than the plain mean (eval/LAB.md).

Shape legend: D calibration domains, N experts of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.greedy import greedy
from moe_fair.core.units import GroupView

DOUBT = 2.0  # m² must exceed so many s² for the first order to count
LEAST = 1e-6  # of observations beyond the first: below it a spread says nothing


def reconstruction(view: GroupView) -> Tensor:
    """[N] mean ‖Δ‖² over tokens, Δ the change of the layer's output without the expert."""
    return view["removed_error"] / view.total_tokens


def first_order(view: GroupView) -> Tensor:
    """[N] mean δ over tokens, signed; δ = ⟨∂ℓ/∂y, Δ⟩, the first order of the loss change."""
    return view["removed_first"] / view.total_tokens


def fisher(view: GroupView) -> Tensor:
    """[N] mean ½ δ² over tokens."""
    return 0.5 * view["removed_gram"].diagonal() / view.total_tokens


def second_order(view: GroupView) -> Tensor:
    """[N] mean δ + ½ δ² over tokens."""
    return first_order(view) + fisher(view)


def set_score(view: GroupView) -> Tensor:
    """[N] what the expert adds to the second order of those that left before it."""
    return _added(view, torch.zeros(view.group.size, dtype=torch.float64))


def agreed_score(view: GroupView) -> Tensor:
    """[N] the same, and of the first order what sequences and domains agree on."""
    return _added(view, first_order(view) * agreement(view))


def measured_score(view: GroupView) -> Tensor:
    """[N] mean of the loss change measured with it alone removed, and of ½ δ² scaled to these."""
    beyond = (view["alone_change"] - view["alone_first"]) / view["alone_tokens"]
    of_share = view["alone_fisher"] / view["alone_tokens"]
    scale = max(0.0, float(beyond.sum()) / max(float(of_share.sum()), 1e-300))
    expected = scale * fisher(view)
    return 0.5 * (beyond + expected) + first_order(view) * agreement(view)


def agreement(view: GroupView) -> Tensor:
    """[N] share of the first order that is no accident of the text: max(0, 1 - 2 s²/m²)."""
    mean = view["removed_first"] / view.total_sequences
    more = _effective(view.row_weights) - 1
    if more < LEAST:
        return torch.zeros_like(mean)
    spread = (view["removed_first_sq"] / view.total_sequences - mean.square()).clamp(min=0)
    noise = _relative(spread / more, mean)
    seen = view.domain_tokens > 0
    tokens = view.domain_tokens[seen]
    share = tokens * view.domain_weights[seen]
    share = share / share.sum()
    more = _effective(share) - 1
    if more >= LEAST:
        means = view.by_domain["removed_first"][seen] / tokens.unsqueeze(1)
        mean = first_order(view)
        noise = torch.maximum(noise, _relative(share @ (means - mean).square() / more, mean))
    return (1 - DOUBT * noise).clamp(min=0)


def _effective(weights: Tensor) -> float:
    """Number of equal weights that average as well as these."""
    return float(weights.sum() ** 2 / weights.square().sum())


def _relative(variance: Tensor, mean: Tensor) -> Tensor:
    """s²/m², 1 where nothing is known."""
    return torch.where(mean == 0, 1.0, variance / mean.square())


def _added(view: GroupView, first: Tensor) -> Tensor:
    """[N] increase of Σ_{e∈S} first_e + ½ Σ_{e,f∈S} max(0, C_ef) by each when its turn comes."""
    gram = 0.5 * (view["removed_gram"] / view.total_tokens).clamp(min=0) + torch.diag(first)
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
    Criterion(
        "counterfactual-agreed", ("removed_first", "removed_first_sq", "removed_gram"),
        "this project", agreed_score,
    ),
    Criterion(
        "counterfactual-measured",
        ("alone_change", "alone_first", "alone_fisher", "alone_tokens", "removed_first",
         "removed_first_sq", "removed_gram"),
        "this project", measured_score,
    ),
)  # fmt: skip
