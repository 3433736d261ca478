"""Units' outputs as their consumers read them: U-Scores and ranks of feature maps.

The U-Score needs whole samples, not sums: each unit's output is projected on directions as the
batches pass, and the projections of as many layers as the memory limit allows are kept until the
last batch; more layers mean more forward passes.

Shape legend: S images, N units of a group, C channels, P positions of a unit's output in one
consumer in one call, D directions, k rows of an image (see `image_axis`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_fair.core.distances import directions, largest_class_distance
from moe_fair.vision.graph import SPATIAL, Graph, Member, logits
from moe_fair.vision.image_axis import USUAL, ImageAxis, Shapes, input_shapes
from moe_fair.vision.layer_input import given
from moe_fair.vision.portions import portion


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


def u_scores(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    watch: MeasureConfig,
    *,
    axes: Mapping[str, ImageAxis] | None = None,
    shapes: Shapes | None = None,
    run: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """FAIR-Pruner's U-Score of every unit, summed over the places where it is read.

    Every call of a layer that runs more than once is such a place.

    At each consumer: the largest sliced Wasserstein distance between two classes of the unit's
    output, which there stands after normalisation, activation, pooling and residual addition.
    Directions depend on the seed and the number of positions only: all units share them.

    Args:
        axes: as for `Gates`.
        shapes: of what the consumers are given of the first two images, where they are known.
        run: runs all images in their order once, for a reason of its own; the first pass is this.
    """
    scores = {g.name: torch.zeros(g.units.size, dtype=torch.float64) for g in graph.groups}
    classes = labels.cpu().numpy()
    axes = axes or {}
    if shapes is None:
        two = images[:2].to(next(model.parameters()).device)
        shapes = input_shapes(model, {m.module for g in graph.groups for m in g.consumers}, two)
    positions = {
        n: [_positions(model, n, s, len(images[:2])) for s in c] for n, c in shapes.items()
    }
    for taps in _passes(graph, len(images), watch, positions):
        stores = _project(model, taps, images, watch, axes, run)
        run = None
        for (place, _), store in sorted(stores.items()):
            tap = taps[place]
            units = slice(tap.first, tap.first + len(tap.index))
            found = largest_class_distance(store, classes)
            scores[tap.group][units] += torch.from_numpy(found)
        del stores
    return scores


def feature_ranks(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    watch: MeasureConfig,
    axes: Mapping[str, ImageAxis] | None = None,
) -> dict[str, Tensor]:
    """Mean rank of each unit's feature map over the images, summed over the places it is read."""
    scores = {g.name: torch.zeros(g.units.size, dtype=torch.float64) for g in graph.groups}
    taps = [Tap(g.name, m.module, 0, index_of(m)) for g in graph.groups for m in g.consumers]

    def rank(tap: Tap, _: int, x: Tensor, layer: nn.Module) -> None:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            maps = x[:, :, tap.index[:, 0].to(x.device)]
            ranks = torch.linalg.matrix_rank(maps.float()).sum(1)
        else:  # no map is left: 1 where the unit is on
            ranks = (unit_outputs(x, tap, layer).abs().amax(-1) > 0).float()
        scores[tap.group] += ranks.sum(0).double().cpu() / len(images)

    _watch(model, taps, images, watch.batch_size, axes or {}, rank)
    return scores


@dataclass(frozen=True)
class Tap:
    """Some units of a group as one consumer reads them. `index`: [n, m] channels of its input."""

    group: str
    module: str
    first: int
    index: Tensor


def unit_outputs(x: Tensor, tap: Tap, layer: nn.Module) -> Tensor:
    """[S, n, P]: every unit's output in a consumer's input, [S, k, ...]."""
    x = x.movedim(2 if isinstance(layer, SPATIAL) else -1, 1)
    flat = x.reshape(*x.shape[:2], -1)
    index = tap.index.to(x.device)
    if index.shape[1] == 1 and torch.equal(
        index[:, 0], torch.arange(flat.shape[1], device=x.device)
    ):
        return flat
    return flat[:, index.flatten()].reshape(len(x), len(index), -1)


def _passes(
    graph: Graph, images: int, watch: MeasureConfig, positions: Mapping[str, Sequence[int]]
) -> Iterator[list[Tap]]:
    """Taps in portions whose projections fit in the memory limit; large ones are split.

    Args:
        images: how many there are.
        positions: P of every consumer in each of its calls.
    """
    portion: list[Tap] = []
    used = 0
    for g in graph.groups:
        for m in g.consumers:
            index = index_of(m)
            wide = (p * index.shape[1] > 1 for p in positions[m.module])
            numbers = sum(watch.directions if w else 1 for w in wide)
            unit_bytes = 4 * images * max(1, numbers)
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


def _positions(model: nn.Module, name: str, shape: torch.Size, images: int) -> int:
    """P of a layer that is given so much of so many images."""
    channels = shape[1 if isinstance(model.get_submodule(name), SPATIAL) else -1]
    return shape.numel() // (images * channels)


def _project(
    model: nn.Module,
    taps: Sequence[Tap],
    images: Tensor,
    watch: MeasureConfig,
    axes: Mapping[str, ImageAxis],
    run: Callable[[], None] | None,
) -> dict[tuple[int, int], np.ndarray]:
    """[n, D, S] float32 projections for each (place of a tap, call of its layer)."""
    stores: dict[tuple[int, int], np.ndarray] = {}
    seen: dict[tuple[int, int], int] = {}
    places = {id(t): i for i, t in enumerate(taps)}
    drawn: dict[int, Tensor] = {}

    def project(tap: Tap, call: int, x: Tensor, layer: nn.Module) -> None:
        i = places[id(tap)], call
        out = unit_outputs(x, tap, layer)
        p = out.shape[-1]
        if p not in drawn:
            drawn[p] = directions(p, watch.directions, watch.seed).to(x.device)
        projected = torch.matmul(out.float(), drawn[p])  # [S, n, D]
        if i not in stores:
            stores[i] = np.empty((*projected.shape[1:], len(images)), dtype=np.float32)
        at = seen.get(i, 0)
        stores[i][:, :, at : at + len(x)] = projected.permute(1, 2, 0).cpu().numpy()
        seen[i] = at + len(x)

    _watch(model, taps, images, watch.batch_size, axes, project, run)
    return stores


def _watch(
    model: nn.Module,
    taps: Sequence[Tap],
    images: Tensor,
    batch_size: int,
    axes: Mapping[str, ImageAxis],
    see: Callable[[Tap, int, Tensor, nn.Module], None],
    run: Callable[[], None] | None = None,
) -> None:
    """Run the images forward and show each tap the input of its layer, [S, k, ...], and which
    call of the layer in this forward it is."""
    by_layer: dict[str, list[Tap]] = {}
    for t in taps:
        by_layer.setdefault(t.module, []).append(t)
    calls: dict[str, int] = {}
    count = 0

    def begin(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        calls.clear()
        count = len(inputs[0])

    def hook(name: str, here: list[Tap]) -> Any:
        @torch.no_grad()
        def look(layer: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            if in_backward():  # a checkpointed block runs once more there
                return
            x = axes.get(name, USUAL).first(given(inputs, named), count)
            for t in here:
                see(t, calls.get(name, 0), x, layer)
            calls[name] = calls.get(name, 0) + 1

        return look

    handles = [model.register_forward_pre_hook(begin)]
    handles += [
        model.get_submodule(n).register_forward_pre_hook(hook(n, here), with_kwargs=True)
        for n, here in by_layer.items()
    ]
    try:
        if run is not None:
            run()
            return
        with torch.no_grad():
            for x, _ in batches(model, images, images[:, 0, 0, 0], batch_size):
                logits(model, x)
    finally:
        for h in handles:
            h.remove()


def in_backward() -> bool:
    """Whether this is called from autograd's engine."""
    return bool(torch._C._current_graph_task_id() != -1)


def batches(
    model: nn.Module, images: Tensor, labels: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    size = portion(images, size, device)
    for at in range(0, len(images), size):
        yield images[at : at + size].to(device), labels[at : at + size].to(device)


def index_of(member: Member) -> Tensor:
    return torch.tensor(member.index)
