"""What six criteria agree on: the mean of an expert's ranks in the whole model.

    S_e = mean over criteria c of   rank of s_c(e) among all experts / (U - 1)

Each criterion estimates by another approximation what an expert is worth, and errs with another
sign: what they say together errs less (eval/LAB.md). Ranks, as their units have nothing in common;
of the whole model, so that layers can be compared. Experts with equal scores share their mean rank.

The six are `OF`: what one collection gathers unasked.

Shape legend: C criteria, U experts of all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.moe.criteria import counterfactual, mone, output_norm, routed_mass, taylor

OF = ("routed-mass", "mone", "reconstruction", "taylor-sq", "counterfactual-agreed", "reap")


def mean_rank(scores: Tensor) -> Tensor:
    """[U] mean rank in the whole model by six criteria: four of outputs, two of gradients."""
    from scipy.stats import rankdata  # `plan` by another method needs no scipy

    ranks = torch.from_numpy(rankdata(scores.numpy(), axis=1)) - 1
    return ranks.mean(0) / max(1, scores.shape[1] - 1)


_known = {
    c.name: c for m in (counterfactual, mone, output_norm, routed_mass, taylor) for c in m.criteria
}
_of = tuple(_known[name] for name in OF)

criteria = (
    Criterion(
        "consensus", tuple(dict.fromkeys(n for c in _of for n in c.needs)), "this project",
        mean_rank, _of,
    ),
)  # fmt: skip
