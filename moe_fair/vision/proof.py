"""The mask check: a group may be cut only where the cut model equals the masked one.

Both run in float64 on a copy whose parameters hide nothing (`trial`), on noise, on the run's own
images (noise is negative where images are not), at another size where the model takes one, and in
training mode. Two outputs that are equal prove nothing where the units have no effect on them: they
must be finite, and masking a group must change them by far more than rounding does. A group of
which nothing shows stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_fair.vision.graph import OUTPUTS, ChannelGroup, Graph, candidates
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.trace import copied, one_line
from moe_fair.vision.trial import Tolerance, Trial

# a group with less than this share of the strongest one's effect is proven without it as well:
# beside it its error could be within the tolerance
SHARE = 1e-3
SILENT = "masking it changes no output, so nothing shows whether a cut would"
DOES_NOT_RUN = "the cut model does not run"
DIFFERS = "the cut model differs from the masked one"
UNKNOWN = "something"


def find_groups(
    model: nn.Module, images: Tensor, *, heads: bool = False, real: Tensor | None = None
) -> Graph:
    """The unit groups of a model that a cut removes exactly, in model order.

    Args:
        images: an example batch of two or more images.
        heads: also try attention heads.
        real: images as the run gives them to the model; numbers in 0..1 otherwise.

    Raises:
        ValueError: nothing can be cut; lists why.
    """
    training = model.training
    model.eval()
    try:
        graph = candidates(model, images[:2], heads=heads)
        groups, whole = list(graph.groups), dict(graph.whole)
        if groups:
            real = torch.rand_like(images) if real is None else real
            outputs = [n for n, why in whole.items() if why == OUTPUTS]
            trial = Trial(model, images[:2], real[:2], outputs)
            groups, why = _proven(trial, groups)
            members = {m.module for g in graph.groups for m in g.members}
            unseen = {n: w for n, w in trial.never_ran.items() if n not in members}
            known = {n: w for n, w in whole.items() if n not in unseen}
            whole = {**unseen, **known, **why}
    finally:
        model.train(training)
    if not groups:
        reasons = "; ".join(f"{n}: {why}" for n, why in whole.items()) or "no layers were found"
        raise ValueError(f"no channels of this model can be cut exactly ({reasons})")
    # numbered as a reader counts them in the tables and pictures
    numbered = [replace(g, units=replace(g.units, layer=i)) for i, g in enumerate(groups)]
    return Graph(tuple(numbered), whole)


def _proven(trial: Trial, groups: list[ChannelGroup]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be cut together, and why the others cannot be cut."""
    if not trial.probes:
        return [], {g.name: "the model's outputs are not finite" for g in groups}
    together, slopes = fault(trial, groups), trial.slopes(groups)
    whole: dict[str, str] = {}
    if together is not None:  # most that is wrong is wrong on the smallest images, too
        seen = _faults(trial.smallest(), groups, slopes, UNKNOWN)
        whole = {n: why for n, why in seen.items() if why is not None and why != SILENT}
        groups = [g for g in groups if g.name not in whole]
        together = fault(trial, groups) if groups else None
    faults = _faults(trial, groups, slopes, together) if groups else {}
    good = [g for g in groups if faults[g.name] is None]
    whole.update({n: why for n, why in faults.items() if why is not None})
    if together is None and len(good) == len(groups):
        return good, whole
    if len(good) > 1:
        fitting = _fitting(trial, good, [])
        kept = {g.name for g in fitting}
        alone = "cannot be cut together with the groups before it"
        whole.update({g.name: alone for g in good if g.name not in kept})
        good = fitting
    return good, whole


def _fitting(
    trial: Trial, groups: list[ChannelGroup], before: list[ChannelGroup]
) -> list[ChannelGroup]:
    """Those that can be cut together with the groups before, as many at once as possible."""
    if fault(trial, [*before, *groups]) is None:
        return groups
    if len(groups) == 1:
        return []
    half = len(groups) // 2
    first = _fitting(trial, groups[:half], before)
    return [*first, *_fitting(trial, groups[half:], [*before, *first])]


def _faults(
    trial: Trial, groups: Sequence[ChannelGroup], slopes: Mapping[str, float], why: str | None
) -> dict[str, str | None]:
    """`fault` of every group, with as many as possible cut together.

    What is wrong is searched for by halves; among groups that pass, those with little effect beside
    the strongest are proven once more among themselves.

    Args:
        why: what is wrong with cutting all of them; something is, where this is not known.
    """
    if len(groups) == 1:
        why = fault(trial, groups) if why == UNKNOWN else why
        return {groups[0].name: why}
    least = SHARE * max(slopes[g.name] for g in groups)
    weak = [g for g in groups if not slopes[g.name] > least]
    if why is None and len(weak) < len(groups):
        seen: dict[str, str | None] = dict.fromkeys(g.name for g in groups)
        return {**seen, **(_faults(trial, weak, slopes, fault(trial, weak)) if weak else {})}
    half = len(groups) // 2
    first, second = groups[:half], groups[half:]
    wrong = fault(trial, first)
    # where the first half is right the second is not: that is no question
    rest = UNKNOWN if wrong is None else fault(trial, second)
    return {**_faults(trial, first, slopes, wrong), **_faults(trial, second, slopes, rest)}


def fault(trial: Trial, groups: Sequence[ChannelGroup]) -> str | None:
    """What is wrong with cutting these groups by plans with unequal counts; None: it is exact.

    There are two: the second removes what the first keeps. Of few units those kept may all be
    silent, as behind a ReLU, and then a wrong cut of them does not show. The smallest images are
    enough for it.
    """
    kept = uneven_plan(groups)
    changed = False
    for plan, part in ((kept, trial), (opposite(groups, kept), trial.smallest())):
        small = copied(trial.model, parameters=False)
        try:
            cut(small, cuts_of(groups, plan))
        except Exception as e:  # a parametrised weight, say
            return f"cannot be cut: {one_line(e)}"
        for probe, dense in part.cheap_first():
            try:
                with torch.no_grad():
                    pruned = probe.run(small)
            except Exception as e:  # whatever the model's own code raises
                return f"{DOES_NOT_RUN} {probe.said}".rstrip() + f": {one_line(e)}"
            masked = trial.masked(probe, groups, plan)
            if len(pruned) != len(masked):
                return DIFFERS
            for d, m, p in zip(dense, masked, pruned, strict=True):
                change = _agreed(d, m, p, trial.tolerance)
                if change is None:
                    return f"{DIFFERS} {probe.said}".rstrip()
                changed |= change
        for probe in trial.random:
            try:
                with torch.no_grad():
                    probe.run(small)
            except Exception as e:
                return f"{DOES_NOT_RUN} {probe.said}: {one_line(e)}"
    return None if changed else SILENT


def opposite(
    groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """The plan that keeps what another removes."""
    return {g.name: sorted(set(range(g.units.size)) - set(kept[g.name])) for g in groups}


def _agreed(dense: Tensor, masked: Tensor, pruned: Tensor, tolerance: Tolerance) -> bool | None:
    """Whether masking changes an output; None where the cut model's is another."""
    if pruned.shape != masked.shape or not bool(masked.isfinite().all()):
        return None
    scale, change = float(dense.abs().max()), float((masked - dense).abs().max())
    most = tolerance.relative * change + tolerance.rounding * scale
    error = float((pruned - masked).abs().max())
    if not error <= min(tolerance.error * scale, most):  # a NaN is no agreement
        return None
    return change > tolerance.change * scale


def uneven_plan(groups: Sequence[ChannelGroup], seed: int = 0) -> dict[str, Sequence[int]]:
    """Random units kept, another share in every group, equal numbers in every block."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, Sequence[int]] = {}
    for g in groups:
        width = g.units.size // g.units.blocks
        share = 0.3 + 0.6 * float(torch.rand((), generator=generator))
        count = min(max(1, round(share * width)), max(1, width - 1))
        ids = [
            b * width + int(i)
            for b in range(g.units.blocks)
            for i in torch.randperm(width, generator=generator)[:count]
        ]
        kept[g.name] = sorted(ids)
    return kept
