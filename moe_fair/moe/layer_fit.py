"""The fit of one layer's experts: what teaches it, which ridge, and whether it is taken at all.

Text that has not taught decides how strongly a fit is regularised, and whether it helps: that of
domains which are left out where there are several; then a held-out share of the sequences.

Shape legend: T tokens, K top-k, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.judging import HELD_OUT
from moe_fair.moe.layer_examples import Kinds
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.repairs import Repair
from moe_fair.moe.routed_output import RoutedOutput, read_down, write_down

ROUNDING = 1e-10  # an error below this is no error
# (tokens, target, ridges, start) -> each ridge with its down projections [E, F, D]
Fits = Callable[..., Iterator[tuple[float, Tensor]]]


class FitText:
    """What went into the pruned layer's experts, and what should come out.

    Args:
        left: domains whose text comes last of what teaches.
        apart: it lies in main memory until it is joined.
    """

    def __init__(self, kinds: Kinds, left: Collection[int], apart: bool) -> None:
        self.kinds, self.left, self.apart = kinds, left, apart
        # what teaches, of other domains and of these; then what judges
        self._parts: list[list[tuple[Tensor, ...]]] = [[], [], []]

    def add(self, j: int, domain: int, watch: BlockRecorder, target: Tensor) -> None:
        part: tuple[Tensor, ...] = (watch.x, watch.index, watch.weights, target)
        self.device = target.device
        for judging in (False, True):
            if self.kinds.counts[judging][j]:
                kept = tuple(self.kinds.some(t, j, judging) for t in part)
                place = 2 if judging else int(domain in self.left)
                self._parts[place].append(tuple(t.cpu() for t in kept) if self.apart else kept)

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
        """Those that teach, then those that judge; how many teach, of other domains and of all."""
        others, left = (sum(len(part[0]) for part in parts) for parts in self._parts[:2])
        columns = zip(*(part for parts in self._parts for part in parts), strict=True)
        x, ids, weights, target = (torch.cat(t).to(self.device) for t in columns)
        self._parts.clear()
        return x, ids, weights, target, (others, others + left)


def fit_layer(
    block: MoeBlock,
    kind: Repair,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    target: Tensor,
    counts: tuple[int, int],
    *,
    keep: bool = True,
) -> tuple[LayerRepair, Tensor | None]:
    """Choose the ridge on text that the fits have not seen, and write the fit into the block.

    Where some of what teaches is of domains that are left out, they choose the ridge, and whether
    there is a fit at all; else the held-out tokens do, who judge the fit in any case.

    Args:
        counts: so many tokens teach, without the domains that are left out and with them; the
            rest judge.
        keep: of the experts' hidden activations what is small, see `RoutedOutput`.

    Returns:
        what was done, and the down projections that were fitted to all tokens: what judges has
        taught them, so that nothing that comes after can be compared with them.
    """
    target = precise(target)
    others, learn = counts
    if not 0 < learn < len(x):
        # too few sequences to hold one out: every fifth token, weaker evidence
        judge = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
        order = torch.argsort(judge.to(torch.uint8), stable=True)
        x, ids, weights, target = x[order], ids[order], weights[order], target[order]
        others = learn = len(x) - len(x) // HELD_OUT
    routed = RoutedOutput(block.experts, x, ids, weights, keep=keep)
    fitting, judging = routed.split(learn)
    path: Fits = getattr(kind, "path", None) or partial(_one_by_one, kind)

    def chosen(
        teach: RoutedOutput, judge: RoutedOutput, at: int, end: int
    ) -> tuple[float, float, float, Tensor | None]:
        """The error before and with the best ridge, that and its fit.

        Args:
            at: so many tokens teach; those from here to `end` judge.
        """
        before = error(judge.output(read_down(block.experts)), target[at:end])
        after, ridge, best = float("inf"), 0.0, None
        for tried, w in path(teach, target[:at], kind.ridges):
            now = error(judge.output(w), target[at:end])
            if (now, tried) < (after, ridge):
                after, ridge, best = now, tried, w if keep else w.cpu()
        return before, after, ridge, best

    if 0 < others < learn:
        elsewhere, after, ridge, best = chosen(*fitting.split(others), others, learn)
        before = error(judging.output(read_down(block.experts)), target[learn:])
        if best is not None and after < elsewhere:
            [(_, w)] = path(fitting, target[:learn], [ridge], best)
            after, best = error(judging.output(w), target[learn:]), w if keep else w.cpu()
        else:
            best = None
    else:
        before, after, ridge, best = chosen(fitting, judging, learn, len(x))
    if best is None or not after < before or before < ROUNDING:
        return LayerRepair(block.name, "none", 0.0, before, before), None
    [(_, w)] = path(routed, target, [ridge], best)
    w = w.to(next(p.dtype for p in block.experts.parameters()))  # as it will be written
    write_down(block.experts, best)
    return LayerRepair(block.name, kind.name, ridge, before, after), w if keep else w.cpu()


def _one_by_one(
    kind: Repair,
    routed: RoutedOutput,
    target: Tensor,
    ridges: Sequence[float],
    _: Tensor | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Each ridge with its fit, none of which knows of another."""
    for ridge in ridges:
        yield ridge, kind.fit(routed, target, ridge)


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def error(y: Tensor, target: Tensor) -> float:
    """‖target - y‖² / ‖target‖²; NaN never passes for small."""
    sums = [(target - y).square().sum(dtype=torch.float64)]
    sums.append(target.square().sum(dtype=torch.float64))
    wrong, size = torch.stack(sums).tolist()  # both at once: a device is waited for
    e = wrong / max(size, 1e-300)
    return e if e == e else float("inf")
