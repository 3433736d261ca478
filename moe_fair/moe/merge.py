"""Merging experts by hierarchical clustering (HC-SMoE, arXiv 2410.08589).

    o_e = mean of f_e(x_t) over the tokens routed to e
    d(A, B) = mean over a in A, b in B of ‖o_a - o_b‖₂        average linkage
    W_A = Σ_{e∈A} n_e W_e / Σ_{e∈A} n_e                       for every matrix and bias of an expert

Clusters are joined until as many are left as the plan's budget keeps, in each run of experts apart
where routing is limited to groups. The expert of a cluster that most tokens were routed to stands
for it: the merged weights take its place, its router row and its routing bias stay as they are.

Two things differ from the paper. Its public code takes o_e over all tokens, whichever expert they
are routed to, for which every expert must run on every token; and it leaves the router whole, every
old row leading to the merged expert of its cluster, for which stock transformers has no format.
With the row of the most used expert a cluster is chosen where that expert was; a token that had two
experts of one cluster now goes to one of them and to the next best cluster.

Shape legend: E experts, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_fair.core.criterion import mean_over_tokens, round_significant
from moe_fair.core.plan import GroupPlan, Plan
from moe_fair.core.units import GroupView, Statistics
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.neurons import NeuronAxis, matched, neuron_axes

if TYPE_CHECKING:  # a plan of clusters is made without transformers
    from moe_fair.moe.checkpoint_source import Checkpoint

name = "merge"  # of --reduce
needs = ("tokens", "output")  # of the statistics
# kept id -> id of each expert of the cluster -> its weight
Shares = Mapping[int, Mapping[int, float]]


def merging(plan: Plan, statistics: Statistics, weights: Mapping[str, float] | None = None) -> Plan:
    """The plan with the same counts, its experts merged instead of removed (not those of a head).

    Args:
        weights: calibration domain -> weight of its statistics.
    """
    how = "by hierarchical clustering of their mean outputs, weighted by frequency"
    return with_merged(plan, statistics, weights, _merge_group, how)


def with_merged(
    plan: Plan,
    statistics: Statistics,
    weights: Mapping[str, float] | None,
    one: Callable[[GroupPlan, GroupView], GroupPlan],
    how: str,
) -> Plan:
    """The plan with every layer's own but those of a head merged, and a note that says how.

    Args:
        one: a layer's plan with its experts merged.
    """
    groups = {g.name: g for g in statistics.groups}
    plans = [
        p if p.follows else one(p, statistics.view(groups[p.name], weights)) for p in plan.groups
    ]
    joined = [shares for p in plans for shares in p.merged.values()]
    note = (
        f"{sum(map(len, joined))} experts are merged into {len(joined)} {how}; the others stay "
        "as they are"
    )
    return replace(plan, groups=plans, notes=[*plan.notes, note])


def _merge_group(plan: GroupPlan, view: GroupView) -> GroupPlan:
    tokens = view["tokens"]
    output = mean_over_tokens(view["output"], tokens.unsqueeze(1))
    kept, merged = [], {}
    for members in clusters(output, len(plan.kept), view.group.blocks):
        n = tokens[members]
        stays = members[int(torch.argmax(n))]  # the lowest id of equals
        kept.append(stays)
        if len(members) > 1:
            share = n / n.sum() if n.sum() > 0 else torch.full_like(n, 1 / len(members))
            merged[str(stays)] = {str(m): s for m, s in zip(members, share.tolist(), strict=True)}
    return replace(plan, kept=sorted(kept), merged=merged)


def clusters(output: Tensor, count: int, blocks: int = 1) -> list[list[int]]:
    """Ids of the experts of each of `count` clusters.

    Args:
        output: [E, D] mean output of each expert.
        blocks: equal runs of experts that have equal numbers of clusters, none across two runs.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import pdist

    run = len(output) // blocks
    found: list[list[int]] = []
    for start in range(0, len(output), run):
        labels = np.zeros(run, dtype=np.int64)
        if run > 1:
            distances = pdist(output[start : start + run].double().numpy())
            # what differs only by the order in which devices add must not decide
            rounded = round_significant(torch.from_numpy(distances)).numpy()
            tree = linkage(rounded, method="average")
            labels = cut_tree(tree, n_clusters=count // blocks)[:, 0]
        for label in range(count // blocks):
            found.append([start + int(i) for i in np.flatnonzero(labels == label)])
    return found


def check_mergeable(source: Checkpoint, *, aligned: bool = False) -> None:
    """The weights can be averaged.

    Args:
        aligned: neuron by neuron.

    Raises:
        ValueError: they are stored in a layout that new values cannot be written in, or
            chosen by a table of token ids; or where their neurons lie is not known.
    """
    from moe_fair.moe.overlay import check_layouts

    if any(b.table is not None for b in source.blocks):
        raise ValueError(
            f"{source.model}: a table of token ids does not lead to merged experts; use "
            "--hash-layers keep or --reduce prune"
        )
    if aligned:
        for block in source.blocks:
            neuron_axes(block)
    check_layouts(source)


@torch.no_grad()
def write_merged(source: Checkpoint, plan: Plan, folder: Path) -> None:
    """Merged tensors of every layer into `folder`, one safetensors file a layer (see `overlay`).

    One layer's weights are in memory at a time, in float32 or more: as exact as they are stored.
    """
    from moe_fair.engines.layers import LayeredModel
    from moe_fair.moe.engine_choice import weight_dtype
    from moe_fair.moe.overlay import ORIGINAL, layer_file, original_tensors

    folder.mkdir(parents=True, exist_ok=True)
    cpu = torch.device("cpu")
    stored = weight_dtype(source, "checkpoint", cpu)
    layered = LayeredModel(
        source.path,
        source.config,
        dtype=torch.promote_types(stored, torch.float32),
        device=cpu,
        trust_remote_code=source.brings_model,
        packing=source.packing,
    )
    blocks = {b.name: b for b in find_blocks(layered.model)}
    for group in plan.groups:
        if not group.merged:
            continue
        block = blocks[group.name]
        with layered.layer(block.layer):
            new = merged_tensors(block, shares_of(group), aligned=plan.aligned)
            old = original_tensors(block, group.kept[0])
        path = layer_file(folder, block)
        partial = path.with_suffix(".partial")
        save_file({**new, **{ORIGINAL + n: old[n] for n in new}}, partial)
        partial.rename(path)


def shares_of(group: GroupPlan) -> Shares:
    """Every kept id, those that stand for themselves included, with what is merged into it."""
    return {
        k: {int(m): s for m, s in group.merged.get(str(k), {str(k): 1.0}).items()}
        for k in group.kept
    }


def merged_tensors(block: MoeBlock, shares: Shares, *, aligned: bool = False) -> dict[str, Tensor]:
    """Name in the model -> the merged tensor, of every parameter of the block's experts.

    Args:
        aligned: the neurons of what is merged are first put into the order of the kept expert's.
    """
    every = {id(p): n for n, p in block.block.named_parameters()}
    routed = set(block.routed)
    axes = neuron_axes(block) if aligned else {}
    orders = dict(_orders(block, shares, axes)) if aligned else {}
    inside = {id(p): n for n, p in block.experts.named_parameters()}
    found = {}
    for axis in block.tensors():
        p = getattr(axis.module, axis.tensor)
        if axis in routed or id(p) not in every:
            continue
        neurons = axes.get(inside[id(p)])
        average = _average(p.detach(), shares, block.num_experts, neurons, orders)
        found[f"{block.name}.{every[id(p)]}"] = average
    return found


def _orders(
    block: MoeBlock, shares: Shares, axes: Mapping[str, NeuronAxis | None]
) -> Iterator[tuple[int, Tensor]]:
    """Each expert that is merged into another, and the order of its neurons that is the other's."""
    size = block.num_experts
    tensors = {n: p.detach() for n, p in block.experts.named_parameters()}
    for kept, members in shares.items():
        for other in members.keys() - {kept}:
            parts = []
            for n, axis in axes.items():
                if axis is not None:
                    one, two = (_of_expert(tensors[n], e, size) for e in (kept, other))
                    parts.append((axis, one, two))
            yield other, matched(parts)


def _of_expert(t: Tensor, expert: int, size: int) -> Tensor:
    """One expert's part: of [E, ...] without that axis; several rows where the axis is longer."""
    width = len(t) // size
    return t[expert] if width == 1 else t[expert * width : (expert + 1) * width]


def _average(
    t: Tensor,
    shares: Shares,
    size: int,
    neurons: NeuronAxis | None,
    orders: Mapping[int, Tensor],
) -> Tensor:
    """[kept, ...] from [E, ...]; several rows an expert where the first axis is longer than E."""
    width = len(t) // size
    parts = []
    for members in shares.values():
        rows = [_of_expert(t, m, size) for m in members]
        if neurons is not None:
            rows = [
                neurons.permuted(r, orders[m]) if m in orders else r
                for m, r in zip(members, rows, strict=True)
            ]
        if len(rows) > 1:
            weighted = [r.double() * s for r, s in zip(rows, members.values(), strict=True)]
            rows = [torch.stack(weighted).sum(0).to(t.dtype)]
        parts.append(rows[0] if width > 1 else rows[0].unsqueeze(0))
    return torch.cat([*parts, t[width * size :]])
