"""What the loss and the layer's output would be without each expert, its tokens routed again.

    Δ_e(t) = y₋ₑ(t) − y(t),    δ_e(t) = ⟨∂ℓ/∂y_t, Δ_e(t)⟩,    ℓ the summed loss of t's sequence

over all tokens, exact (see `moe.rerouting`). ‖Δ‖² is what NAEE (arXiv 2402.14800) measures of
single removals; the rest is this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.halves import in_first_half
from moe_fair.moe.rerouting import Candidates, Rerouting
from moe_fair.moe.statistic import Pass, Statistic

name = "counterfactual"
collected = "usual"
names = {
    "removed_error": Statistic("E", "Σ ‖Δ_e‖²"),
    "removed_first": Statistic("E", "Σ δ_e", needs_backward=True),
    "removed_first_sq": Statistic("E", "Σ over sequences of (Σ δ_e)²", needs_backward=True),
    "removed_gram": Statistic("E E", "Σ δ_e δ_f", needs_backward=True),
    "removed_half_sq": Statistic("E", "Σ δ_e² over every other sequence", needs_backward=True),
}


def watch(block: MoeBlock) -> Rerouting:
    """The router's choices with an expert removed."""
    return Rerouting(block)


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[E] ‖Δ_e‖²; the further candidates' outputs wait for the gradient."""
    rerouting: Rerouting = seen.watched[name]
    routes = rerouting.routes(seen.index, seen.weights)
    candidates = Candidates.of(seen.index, *routes, seen.size)
    token = candidates.tokens_of_extra()
    ids, weights = candidates.extra_ids_and_weights()
    others = seen.outputs(seen.x[token], ids, weights.to(seen.weights.dtype))
    errors = candidates.errors(candidates.outputs(seen.f, others))
    if seen.backward:
        seen.kept |= {"candidates": candidates, "others": others}
    return {"removed_error": seen.over_tokens(errors)}


def output_gradient(seen: Pass, gradient: Tensor) -> None:
    """⟨G, f⟩ of the further candidates from G = dL/dy [T, D]; the routed ones come by the gate."""
    token, others = seen.kept["candidates"].tokens_of_extra(), seen.kept.pop("others")
    precise = torch.promote_types(others.dtype, torch.float32)
    seen.kept["products"] = torch.linalg.vecdot(gradient[token].to(precise), others.to(precise))


def backward(seen: Pass) -> dict[str, Tensor]:
    """δ from the gradient of the mean loss, n times of which is the summed one's."""
    candidates, k = seen.kept["candidates"], seen.gradient.shape[1]
    products = seen.gradient.new_zeros(candidates.ids.shape, dtype=torch.float64)
    products[:, :k] = seen.gradient.double()
    products.view(-1)[candidates.extra] = seen.kept["products"].double()
    mask = seen.batch.mask
    tokens = seen.batch.predicted().repeat_interleave(mask.shape[1])
    delta = candidates.first_order(products * tokens.unsqueeze(1))
    first = seen.over_tokens(delta)
    if seen.counted is not None:
        delta = delta * mask.flatten().to(delta).unsqueeze(1)
    by_sequence = delta.view(*mask.shape, -1)
    per_sequence = by_sequence.sum(1)
    half = in_first_half(seen.batch.sequence_ids).to(delta)
    return {
        "removed_first": first,
        "removed_first_sq": per_sequence.square().sum(0),
        "removed_gram": delta.T @ delta,
        "removed_half_sq": half @ by_sequence.square().sum(1),
    }
