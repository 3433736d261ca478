"""Watching units on labelled images: U-Scores, gate Taylor rows, and what the weights say.

The gate Taylor needs one backward per batch for all layers together.

Shape legend: S images, N units of a group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.core.units import Statistics
from moe_fair.engines.oom import out_of_memory
from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import (
    BATCH_NORMS,
    BY_CHANNEL,
    TRANSPOSED,
    ChannelGroup,
    Graph,
    Member,
    is_depthwise,
    logits,
)
from moe_fair.vision.image_axis import ImageAxis, Shapes, image_axes, input_shapes
from moe_fair.vision.trace import one_line, unchecked
from moe_fair.vision.unit_outputs import MeasureConfig, batches, feature_ranks, index_of, u_scores

DOMAIN = "images"
UNDIFFERENTIATED = (
    "the model's loss cannot be differentiated; take scores without gradients, as "
    "--removal u-score --allocate uniform"
)
OF_IMAGES = {
    "u_score", "rows", "weight_taylor", "logit_change", "logit_change_sq", "feature_rank"
}  # fmt: skip
WEIGHT_STATISTICS = ("l1_norm", "l2_norm", "bn_scale")


def collect(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    *,
    needs: Collection[str],
    watch: MeasureConfig | None = None,
    metadata: dict[str, Any] | None = None,
) -> Statistics:
    """Statistics of every unit; the model runs in eval mode and is left as it was.

    Args:
        images, labels: [S, channels, H, W] and [S]; on the model's device or not.
        needs: statistics to collect: `u_score`, `rows`, `weight_taylor`, `logit_change`,
            `logit_change_sq`, `feature_rank`, `l1_norm`, `l2_norm`, `bn_scale`, `seed`.

    Raises:
        ValueError: a statistic that this model does not have.
    """
    watch = watch or MeasureConfig()
    training = model.training
    model.eval()
    order = torch.argsort(labels, stable=True)  # class by class: sorted once, sliced ever after
    images, labels = images[order], labels[order]
    names = [g.name for g in graph.groups]
    constants: dict[str, dict[str, Tensor]] = {n: {} for n in names}
    rows: dict[str, Tensor] = {}
    try:
        for name in WEIGHT_STATISTICS:
            if name in needs:
                for g in graph.groups:
                    constants[g.name][name] = _weights(model, g, name)
        if "seed" in needs:
            for g in graph.groups:
                constants[g.name]["seed"] = torch.full((g.units.size,), float(watch.seed))
        differentiated = {"rows", "weight_taylor"} & set(needs)
        axes: dict[str, ImageAxis] = {}
        shapes: Shapes | None = None
        if OF_IMAGES & set(needs):
            layers = {m.module for g in graph.groups for m in (*g.consumers, *g.norms)}
            two = images[:2].to(next(model.parameters()).device)
            shapes = input_shapes(model, layers, two)
            axes = image_axes(model, layers, two, shapes)

        def differentiate() -> None:
            nonlocal rows
            rows, weight = taylor(
                model, graph, images, labels, watch, axes, weights="weight_taylor" in needs
            )
            for n, w in weight.items():
                constants[n]["weight_taylor"] = w

        if "u_score" in needs:  # watched while the forward for the gradients runs, if there is one
            run = differentiate if differentiated else None
            found = u_scores(model, graph, images, labels, watch, axes=axes, shapes=shapes, run=run)
            for n, u in found.items():
                constants[n]["u_score"] = u
        elif differentiated:
            differentiate()
        if "feature_rank" in needs:
            for n, r in feature_ranks(model, graph, images, watch, axes).items():
                constants[n]["feature_rank"] = r
        if {"logit_change", "logit_change_sq"} & set(needs):
            for n, change in logit_changes(model, graph, images, labels, watch, axes).items():
                constants[n]["logit_change"] = change.mean(0)
                constants[n]["logit_change_sq"] = change.square().mean(0)
    finally:
        model.train(training)
    count = len(images)
    return Statistics(
        groups=graph.units,
        domains=(DOMAIN,),
        sums={n: {} for n in names},
        constants=constants,
        rows=rows,
        sequence_ids=torch.arange(count),
        sequence_domains=torch.zeros(count, dtype=torch.int64),
        tokens=torch.tensor([float(count)], dtype=torch.float64),
        sequences=torch.tensor([float(count)], dtype=torch.float64),
        metadata=metadata or {},
    )


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients on; what the model's own code cannot differentiate is told.

    Raises:
        ValueError: no gradient comes out of it.
    """
    with torch.enable_grad(), unchecked():
        try:
            yield
        except RuntimeError as e:
            if out_of_memory(e):
                raise
            raise ValueError(f"{UNDIFFERENTIATED} ({one_line(e)})") from e


def taylor(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    watch: MeasureConfig,
    axes: Mapping[str, ImageAxis] | None = None,
    *,
    weights: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """∂L/∂z of every unit's gate at z = 1, for each image; one backward for all layers.

    Args:
        axes: as for `Gates`.
        weights: also Σ w·∂L/∂w over each unit's own filter, L the mean loss.

    Returns:
        group -> [S, N] float64 rows, and group -> [N] signed weight sums (empty without `weights`).
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    filters: dict[str, Any] = {
        m.module: model.get_submodule(m.module).weight
        for g in graph.groups
        for m in _filters(model, g)
    }
    parts = []
    # gates of a half-precision model are float32, so that their gradients are summed there
    precision = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    model.zero_grad(set_to_none=True)
    try:
        for p in model.parameters():
            p.requires_grad_(False)
        if weights:
            for p in filters.values():
                p.requires_grad_(True)
        with Gates(model, graph.groups, axes) as gates, with_gradients():
            for x, y in batches(model, images, labels, watch.batch_size):
                gates.open(len(x), precision, x.device)
                # summed, not averaged: every image keeps its own gradient
                nn.functional.cross_entropy(logits(model, x), y, reduction="sum").backward()
                if gates.values.grad is None:
                    raise ValueError(f"{UNDIFFERENTIATED} (no unit reaches the loss)")
                parts.append(gates.values.grad.cpu().double())
        found = torch.cat(parts)
        rows = {
            g.name: found[:, gates.offsets[g.name] :][:, : g.units.size].contiguous()
            for g in graph.groups
        }
        sums = {}
        if weights:
            for g in graph.groups:
                total = torch.zeros(g.units.size, dtype=torch.float64)
                for m in _filters(model, g):
                    p = filters[m.module]
                    product = by_output(model.get_submodule(m.module), p.detach() * p.grad)
                    product = product.double().flatten(1).sum(1).cpu()
                    total += product[index_of(m)].sum(1) / len(images)
                sums[g.name] = total
        return rows, sums
    finally:
        model.zero_grad(set_to_none=True)
        for p, flag in flags.items():
            p.requires_grad_(flag)


def logit_changes(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    watch: MeasureConfig,
    axes: Mapping[str, ImageAxis] | None = None,
) -> dict[str, Tensor]:
    """Group -> [S, N] float64: each image's loss at f - ∂f/∂z minus that at its logits f.

    The logits are taken as linear in the gate z, which is exact until an activation behind it
    changes sides of a kink; the loss is not, and so a confident image counts as little as it does
    when the unit is really removed. As many backwards per batch as there are classes.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    precision = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    parts = []
    try:
        model.requires_grad_(False)
        with Gates(model, graph.groups, axes) as gates, with_gradients():
            for x, y in batches(model, images, labels, watch.batch_size):
                gates.open(len(x), precision, x.device)
                out = logits(model, x)
                f = out.detach().double()
                total = torch.full((len(x), gates.total), -torch.inf, dtype=torch.float64)
                target = torch.zeros_like(total)
                for c in range(out.shape[1]):
                    [slope] = torch.autograd.grad(out[:, c].sum(), gates.values, retain_graph=True)
                    new = (f[:, c, None] - slope[:, :-1].double()).cpu()
                    total = torch.logaddexp(total, new)
                    target = torch.where((y.cpu() == c)[:, None], new, target)
                before = nn.functional.cross_entropy(f, y, reduction="none").cpu()
                parts.append(total - target - before[:, None])
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    found = torch.cat(parts)
    return {
        g.name: found[:, gates.offsets[g.name] :][:, : g.units.size].contiguous()
        for g in graph.groups
    }


def _filters(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """The layers whose rows make the group's units."""
    return [
        m
        for m in group.members
        if m.side == "out"
        and not isinstance(model.get_submodule(m.module), BY_CHANNEL)
        and not is_depthwise(model.get_submodule(m.module))
    ]


def by_output(layer: nn.Module, values: Tensor | None = None) -> Tensor:
    """[out, ...] a layer's weight, or values in its shape; a transposed one has [in, out]."""
    values = layer.weight if values is None else values  # type: ignore[assignment]
    assert values is not None
    return values.transpose(0, 1) if isinstance(layer, TRANSPOSED) else values


def _weights(model: nn.Module, group: ChannelGroup, name: str) -> Tensor:
    """[N] a norm of each unit's filters, or its batch normalisation scales, summed over members."""
    total = torch.zeros(group.units.size, dtype=torch.float64)
    if name == "bn_scale":
        norms = [
            m
            for m in group.members
            if isinstance(norm := model.get_submodule(m.module), BATCH_NORMS) and norm.affine
        ]
        if not norms:
            raise ValueError(
                f"criterion 'bn-scale' needs batch normalisation, and {group.name} has none; "
                "choose another, as --removal l1"
            )
        for m in norms:
            scale: Any = model.get_submodule(m.module).weight
            scale = scale.detach().double().cpu().abs()
            total += scale[index_of(m)].sum(1)
        return total
    for m in _filters(model, group):
        w = by_output(model.get_submodule(m.module)).detach().double().cpu().flatten(1)
        rows = w[index_of(m).flatten()].reshape(group.units.size, -1)
        total += rows.norm(p=1 if name == "l1_norm" else 2, dim=1)
    return total
