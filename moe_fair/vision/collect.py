"""Watching units on labelled images: U-Scores, gate Taylor rows, and what the weights say.

The U-Score needs whole samples, not sums: each unit's output is projected on directions as the
batches pass, and the projections of as many layers as the memory limit allows are kept until the
last batch; more layers mean more forward passes. The gate Taylor needs one backward per batch for
all layers together.

Shape legend: S images, N units of a group, C channels, P positions of a unit's output in one
consumer, D directions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_fair.core.distances import directions, largest_class_distance
from moe_fair.core.units import Statistics
from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import (
    BATCH_NORMS,
    NORMS,
    SPATIAL,
    TRANSPOSED,
    ChannelGroup,
    Graph,
    Member,
    is_depthwise,
    logits,
)

DOMAIN = "images"
WEIGHT_STATISTICS = ("l1_norm", "l2_norm", "bn_scale")


@dataclass(frozen=True)
class MeasureConfig:
    """How to measure.

    Attributes:
        batch_size: images per forward.
        directions: D of the sliced distance.
        seed: draws the directions, and what `random` scores.
        memory: bytes that the projections of one pass may take.
    """

    batch_size: int = 64
    directions: int = 128
    seed: int = 0
    memory: int = 1 << 30


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
        if "u_score" in needs:
            for n, u in u_scores(model, graph, images, labels, watch).items():
                constants[n]["u_score"] = u
        if "feature_rank" in needs:
            for n, r in feature_ranks(model, graph, images, watch).items():
                constants[n]["feature_rank"] = r
        if {"rows", "weight_taylor"} & set(needs):
            rows, weight = taylor(
                model, graph, images, labels, watch, weights="weight_taylor" in needs
            )
            for n, w in weight.items():
                constants[n]["weight_taylor"] = w
        if {"logit_change", "logit_change_sq"} & set(needs):
            for n, change in logit_changes(model, graph, images, labels, watch).items():
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


def taylor(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    watch: MeasureConfig,
    *,
    weights: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """∂L/∂z of every unit's gate at z = 1, for each image; one backward for all layers.

    Args:
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
        with Gates(model, graph.groups) as gates, torch.enable_grad():
            for x, y in _batches(model, images, labels, watch.batch_size):
                gates.values = torch.ones(
                    len(x), gates.total + 1, device=x.device, dtype=precision, requires_grad=True
                )
                # summed, not averaged: every image keeps its own gradient
                nn.functional.cross_entropy(logits(model, x), y, reduction="sum").backward()
                assert gates.values.grad is not None
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
                    total += product[_index(m)].sum(1) / len(images)
                sums[g.name] = total
        return rows, sums
    finally:
        model.zero_grad(set_to_none=True)
        for p, flag in flags.items():
            p.requires_grad_(flag)


def logit_changes(
    model: nn.Module, graph: Graph, images: Tensor, labels: Tensor, watch: MeasureConfig
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
        with Gates(model, graph.groups) as gates, torch.enable_grad():
            for x, y in _batches(model, images, labels, watch.batch_size):
                gates.values = torch.ones(
                    len(x), gates.total + 1, device=x.device, dtype=precision, requires_grad=True
                )
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


def u_scores(
    model: nn.Module, graph: Graph, images: Tensor, labels: Tensor, watch: MeasureConfig
) -> dict[str, Tensor]:
    """FAIR-Pruner's U-Score of every unit, summed over the places where it is read.

    At each consumer: the largest sliced Wasserstein distance between two classes of the unit's
    output, which there stands after normalisation, activation, pooling and residual addition.
    Directions depend on the seed and the number of positions only: all units share them.
    """
    scores = {g.name: torch.zeros(g.units.size, dtype=torch.float64) for g in graph.groups}
    classes = labels.cpu().numpy()
    for taps in _passes(model, graph, images, watch):
        stores = _project(model, taps, images, watch)
        for tap, store in zip(taps, stores, strict=True):
            units = slice(tap.first, tap.first + len(tap.index))
            found = largest_class_distance(store, classes)
            scores[tap.group][units] += torch.from_numpy(found)
        del stores
    return scores


def feature_ranks(
    model: nn.Module, graph: Graph, images: Tensor, watch: MeasureConfig
) -> dict[str, Tensor]:
    """Mean rank of each unit's feature map over the images, summed over the places it is read."""
    scores = {g.name: torch.zeros(g.units.size, dtype=torch.float64) for g in graph.groups}
    taps = [Tap(g.name, m.module, 0, _index(m)) for g in graph.groups for m in g.consumers]

    def rank(tap: Tap, x: Tensor, layer: nn.Module) -> None:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            maps = x[:, tap.index[:, 0].to(x.device)]
            ranks = torch.linalg.matrix_rank(maps.float())
        else:  # no map is left: 1 where the unit is on
            ranks = (unit_outputs(x, tap, layer).abs().amax(-1) > 0).float()
        scores[tap.group] += ranks.sum(0).double().cpu() / len(images)

    _watch(model, taps, images, watch.batch_size, rank)
    return scores


@dataclass(frozen=True)
class Tap:
    """Some units of a group as one consumer reads them. `index`: [n, m] channels of its input."""

    group: str
    module: str
    first: int
    index: Tensor


def unit_outputs(x: Tensor, tap: Tap, layer: nn.Module) -> Tensor:
    """[S, n, P]: every unit's output in a consumer's input."""
    x = x if isinstance(layer, SPATIAL) else x.movedim(-1, 1)
    flat = x.reshape(*x.shape[:2], -1)
    index = tap.index.to(x.device)
    if index.shape[1] == 1 and torch.equal(
        index[:, 0], torch.arange(flat.shape[1], device=x.device)
    ):
        return flat
    return flat[:, index.flatten()].reshape(len(x), len(index), -1)


def _passes(
    model: nn.Module, graph: Graph, images: Tensor, watch: MeasureConfig
) -> Iterator[list[Tap]]:
    """Taps in portions whose projections fit in the memory limit; large ones are split."""
    positions = _positions(model, graph, images[:1])
    portion: list[Tap] = []
    used = 0
    for g in graph.groups:
        for m in g.consumers:
            index = _index(m)
            wide = positions[m.module] * index.shape[1] > 1
            unit_bytes = 4 * len(images) * (watch.directions if wide else 1)
            step = max(1, watch.memory // unit_bytes)
            for first in range(0, len(index), step):
                tap = Tap(g.name, m.module, first, index[first : first + step])
                need = unit_bytes * len(tap.index)
                if portion and used + need > watch.memory:
                    yield portion
                    portion, used = [], 0
                portion.append(tap)
                used += need
    if portion:
        yield portion


def _positions(model: nn.Module, graph: Graph, image: Tensor) -> dict[str, int]:
    """Consumer -> positions per channel of its input."""
    found: dict[str, int] = {}
    taps = [Tap(g.name, m.module, 0, _index(m)[:1]) for g in graph.groups for m in g.consumers]

    def look(tap: Tap, x: Tensor, layer: nn.Module) -> None:
        found[tap.module] = unit_outputs(x, tap, layer).shape[-1] // tap.index.shape[1]

    _watch(model, taps, image, 1, look)
    return found


def _project(
    model: nn.Module, taps: Sequence[Tap], images: Tensor, watch: MeasureConfig
) -> list[np.ndarray]:
    """[n, D, S] float32 projections for each tap."""
    stores: dict[int, np.ndarray] = {}
    seen = dict.fromkeys(range(len(taps)), 0)
    places = {id(t): i for i, t in enumerate(taps)}
    drawn: dict[int, Tensor] = {}

    def project(tap: Tap, x: Tensor, layer: nn.Module) -> None:
        i = places[id(tap)]
        out = unit_outputs(x, tap, layer)
        p = out.shape[-1]
        if p not in drawn:
            drawn[p] = directions(p, watch.directions, watch.seed).to(x.device)
        projected = torch.matmul(out.float(), drawn[p])  # [S, n, D]
        if i not in stores:
            stores[i] = np.empty((*projected.shape[1:], len(images)), dtype=np.float32)
        at = seen[i]
        stores[i][:, :, at : at + len(x)] = projected.permute(1, 2, 0).cpu().numpy()
        seen[i] += len(x)

    _watch(model, taps, images, watch.batch_size, project)
    return [stores[i] for i in range(len(taps))]


def _watch(
    model: nn.Module, taps: Sequence[Tap], images: Tensor, batch_size: int, see: Any
) -> None:
    """Run the images forward and show each tap the input of its layer."""
    by_layer: dict[str, list[Tap]] = {}
    for t in taps:
        by_layer.setdefault(t.module, []).append(t)

    def hook(here: list[Tap]) -> Any:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for t in here:
                see(t, inputs[0], layer)

        return look

    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook(here)) for n, here in by_layer.items()
    ]
    try:
        with torch.no_grad():
            for x, _ in _batches(model, images, images[:, 0, 0, 0], batch_size):
                logits(model, x)
    finally:
        for h in handles:
            h.remove()


def _batches(
    model: nn.Module, images: Tensor, labels: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for at in range(0, len(images), size):
        yield images[at : at + size].to(device), labels[at : at + size].to(device)


def _index(member: Member) -> Tensor:
    return torch.tensor(member.index)


def _filters(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """The layers whose rows make the group's units."""
    return [
        m
        for m in group.members
        if m.side == "out"
        and not isinstance(model.get_submodule(m.module), NORMS)
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
            total += scale[_index(m)].sum(1)
        return total
    for m in _filters(model, group):
        w = by_output(model.get_submodule(m.module)).detach().double().cpu().flatten(1)
        rows = w[_index(m).flatten()].reshape(group.units.size, -1)
        total += rows.norm(p=1 if name == "l1_norm" else 2, dim=1)
    return total
