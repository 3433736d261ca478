"""Merging experts into those that stay: REAM (arXiv 2604.04356).

    S_e = mean of g_e‖f_e‖₂ over the tokens routed to e                  saliency, as in REAP
    δ(i, j) = ½ (δ_gate + δ_out)                                          likeness
    δ_out = ½ (1 + cos(Σ g_i f_i, Σ g_j f_j))
    δ_gate = 1 - d_ij / max d,   d_ij = ‖z_i/‖z_i‖ - z_j/‖z_j‖‖₂      z_e [T]: the router's logits
    W_A = Σ_{e∈A} S_e P_e W_e / Σ_{e∈A} S_e                               P_e: see `neurons`

The experts that the plan keeps are the centroids: with the method `reap`, the default, those of
the highest saliency, as in the paper. In the order of their saliency each takes the experts most
like it that none has taken yet, until its group has 16, so that few groups are large and most
centroids stay as they are. An expert that no token was routed to counts as the least salient of the
others. The router keeps the rows of the centroids.

Three things differ from the paper and its public code: outputs are those of the routed tokens with
the weights that the model applies, not of every expert on every token; neurons are matched by their
weights alone; and all layers are merged by the statistics of one pass, where the paper runs the
layers again after each merge. `--repair` walks the layers in that order, and makes good what the
earlier ones changed.

Shape legend: E experts, D model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from moe_fair.core.criterion import mean_over_tokens, round_significant
from moe_fair.core.plan import GroupPlan, Plan
from moe_fair.core.units import GroupView, Statistics
from moe_fair.moe.merge import with_merged

name = "ream"  # of --reduce
needs = ("tokens", "gated_norm", "gated_output", "router_gram")  # of the statistics
MOST = 16  # experts of a group, the paper's C


def merging(plan: Plan, statistics: Statistics, weights: Mapping[str, float] | None = None) -> Plan:
    """The plan, its other experts merged into those that it keeps (not those of a head).

    Args:
        weights: calibration domain -> weight of its statistics.
    """
    how = "by saliency and likeness (REAM), neuron by neuron"
    return with_merged(plan, statistics, weights, _merge_group, how)


def _merge_group(plan: GroupPlan, view: GroupView) -> GroupPlan:
    saliency = round_significant(mean_over_tokens(view["gated_norm"], view["tokens"]))
    used = saliency[saliency > 0]
    saliency = saliency.masked_fill(saliency <= 0, float(used.min()) if len(used) else 1.0)
    merged = {}
    for centre, others in groups(likeness(view), saliency, plan.kept).items():
        members = [centre, *others]
        if others:
            share = saliency[members] / saliency[members].sum()
            merged[str(centre)] = {str(m): s for m, s in zip(members, share.tolist(), strict=True)}
    return replace(plan, merged=merged)


def likeness(view: GroupView) -> Tensor:
    """[E, E] δ, between 0 and 1; rounded: the order in which devices add must not decide."""
    angle = (2 - 2 * _cosines(view["router_gram"])).clamp(min=0).sqrt()
    output = view["gated_output"]
    found = 1 - angle / angle.max().clamp(min=1e-300) + (1 + _cosines(output @ output.T)) / 2
    return round_significant(found / 2)


def _cosines(gram: Tensor) -> Tensor:
    """[E, E] of vectors with these products; 0 with one that is zero."""
    size = gram.diagonal().clamp(min=0).sqrt()
    return gram / (size[:, None] * size).clamp(min=1e-300)


def groups(likeness: Tensor, saliency: Tensor, kept: Sequence[int]) -> dict[int, list[int]]:
    """Each centroid with the experts merged into it, the most like it first.

    Args:
        likeness: [E, E].
        saliency: [E].
        kept: the centroids.
    """
    free = set(range(len(saliency))) - set(kept)
    most = max(MOST, -(-len(saliency) // len(kept)))
    found = {}
    for centre in sorted(kept, key=lambda e: (-float(saliency[e]), e)):
        near = sorted(free, key=lambda e: (-float(likeness[centre, e]), e))[: most - 1]
        found[centre] = near
        free -= set(near)
    return found
