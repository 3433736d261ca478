"""What is said of a run that took channels out of an image classifier: a report, and a screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_fair.core.allocate import tod
from moe_fair.core.plan import GroupPlan, Plan
from moe_fair.core.ranking import rank
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.report import channel_figures
from moe_fair.report.document import Block, Document, Figure, Section, Table, Text, screen
from moe_fair.report.figures import Curve
from moe_fair.report.numbers import bar, change, clipped, depths, loading, method

GROUP_COLUMNS = ("group", "units", "kept", "removed", "ToD", "null depth")
SHARES = ("parameters", "multiply-adds")


def document(plans: Sequence[Plan], result: dict[str, Any]) -> Document:
    """The report.

    Args:
        plans: one for each step; the pictures show the last.
        result: as in `result.json`.
    """
    plan, settings, steps = plans[-1], result["settings"], result["steps"]
    parts: list[tuple[str, Iterable[Block]]] = [
        ("In short", [_costs(result), *_images(result), *_notes(plan, result)]),
        ("Latency, median ms per forward", [_latencies(result)]),
        ("Units kept and removed", _budget(plan, steps[-1].get("shares"))),
    ]
    if plan.protection is not None:
        parts.append(("Tolerance of Difference", _tod(plan)))
    parts.append(("Scores", _scores(plan)))
    if removal := steps[0].get("removal"):
        whole = result["cost"]["dense"]["operations"]
        parts.append(("Removal while training", _training(removal, whole)))
    if len(plans) > 1:
        parts.append(("Steps", [_steps(steps)]))
    if result["left_whole"]:
        parts.append(("Left whole", [_whole(result)]))
    return Document(
        title=f"{settings['model']} pruned on {settings['data']}",
        subtitle=f"{_kept(plans)}.",
        sections=tuple(Section(title, tuple(blocks)) for title, blocks in parts),
    )


def summary(plans: Sequence[Plan], result: dict[str, Any], output: Path) -> Document:
    """The screen: the last plan, what the model costs now, how fast and how good it is."""
    plan = plans[-1]
    groups = Table(
        (*GROUP_COLUMNS, "kept of all"),
        tuple((*_group(g, clipped(g.name)), bar(len(g.kept) / g.size)) for g in plan.groups),
        words=(0, len(GROUP_COLUMNS)),
    )
    costs: list[Block] = [_costs(result, [_speed(r) for r in result["latency_ms"]])]
    return screen(
        [groups],
        [Text(_kept(plans)), *_notes(plan, result)],
        costs,
        [loading(output, "the scores")],
    )


def _kept(plans: Sequence[Plan]) -> str:
    plan = plans[-1]
    units, kept = sum(g.size for g in plan.groups), sum(len(g.kept) for g in plan.groups)
    last = " in the last step" if len(plans) > 1 else ""
    return f"{kept:,} of {units:,} units kept{last}, {method(plan)}"


def _notes(plan: Plan, result: dict[str, Any]) -> list[Text]:
    return [Text(note, note=True) for note in [*plan.notes, *result.get("notes", [])]]


def _images(result: dict[str, Any]) -> list[Text]:
    """Of which data; results of earlier versions do not say."""
    if (of := result.get("images")) is None:
        return []
    return [
        Text(
            f"{of['train']:,} images to score and train on, {of['test']:,} to test on, "
            f"{of['classes']:,} classes."
        )
    ]


def _costs(result: dict[str, Any], more: Sequence[tuple[str, ...]] = ()) -> Table:
    """Parameters, multiply-adds and accuracy before and after."""
    top, cost = result["top1"], result["cost"]
    rows = []
    for name, label in (("parameters", "parameters"), ("operations", "multiply-adds")):
        before, after = cost["dense"][name], cost["pruned"][name]
        rows.append((label, f"{before:,}", f"{after:,}", change(before, after)))
    stages = [("top-1", "final")]
    if top["pruned"] != top["final"]:
        stages = [("top-1 after the last cut", "pruned"), ("top-1 after fine-tuning", "final")]
    for label, name in stages:
        points = f"{100 * (top[name] - top['dense']):+.2f} points"
        rows.append((label, f"{top['dense']:.2%}", f"{top[name]:.2%}", points))
    return Table(("", "dense", "pruned", "change"), (*rows, *more))


def _speed(row: dict[str, float]) -> tuple[str, ...]:
    faster = f"{_faster(row)} as fast"
    return f"ms at batch {row['batch']}", f"{row['dense']:.2f}", f"{row['pruned']:.2f}", faster


def _faster(row: dict[str, float]) -> str:
    """`1.50 × (1.42-1.61)`; results of earlier versions have the medians alone."""
    if "faster" not in row:
        return f"{row['dense'] / row['pruned']:.2f} ×"
    return f"{row['faster']:.2f} × ({row['low']:.2f}–{row['high']:.2f})"


def _latencies(result: dict[str, Any]) -> Table:
    return Table(
        ("batch", "dense", "pruned", "speed-up"),
        tuple(
            (str(r["batch"]), f"{r['dense']:.2f}", f"{r['pruned']:.2f}", _faster(r))
            for r in result["latency_ms"]
        ),
    )  # fmt: skip


def _group(g: GroupPlan, name: str) -> tuple[str, ...]:
    return name, str(g.size), str(len(g.kept)), str(g.depth), *depths(g)


def _budget(plan: Plan, shares: dict[str, Sequence[float]] | None) -> Iterator[Block]:
    groups = plan.groups
    null = None
    reading = "Blue: units kept; grey: removed. In brackets the units that there were."
    if plan.tolerance is not None:
        null = [1 - (g.null_depth or 0) / g.size for g in groups]
        reading += " Red: where the tolerance would stop if the two rankings were unrelated."
    picture = channel_figures.kept_shares(
        [f"{g.name}  ({g.size})" for g in groups], [len(g.kept) / g.size for g in groups], null
    )
    yield Figure("kept", picture, "Bars of units kept and removed in every group", reading)
    if shares is None:  # of an earlier version
        yield Table(GROUP_COLUMNS, tuple(_group(g, g.name) for g in groups))
        return
    columns = (*GROUP_COLUMNS, *(f"of the {s}" for s in SHARES))
    rows = ((*_group(g, g.name), *(f"{s:.1%}" for s in shares[g.name])) for g in groups)
    yield Table(columns, tuple(rows))


def _tod(plan: Plan) -> Iterator[Block]:
    yield Figure(
        "tod",
        channel_figures.tod_lines([_curve(g) for g in plan.groups], plan.tolerance),
        "ToD over the share of removed units, one line a group",
        "Overlap of the units that would leave and those that are protected most, against the "
        "share removed; the dot is the depth chosen. Dashed: what two unrelated rankings give.",
    )


def _curve(g: GroupPlan) -> Curve:
    scores = [
        Scores(kind, {g.name: torch.tensor(getattr(g, kind), dtype=torch.float64)})
        for kind in ("removal", "protection")
    ]
    [ranked] = rank((UnitGroup(g.name, g.layer, g.size),), *scores)
    return Curve(g.name, tod.curve(ranked), g.depth)


def _scores(plan: Plan) -> Iterator[Block]:
    kinds = [("removal", plan.removal)]
    kinds += [("protection", plan.protection)] if plan.protection else []
    panels = [
        (f"{kind}: {name}", [np.array(getattr(g, kind), dtype=float) for g in plan.groups])
        for kind, name in kinds
    ]
    yield Figure(
        "scores",
        channel_figures.score_boxes(panels, [g.name for g in plan.groups]),
        f"Box plots of the {' and '.join(kind for kind, _ in kinds)} scores of every group",
        "Scores over their group's mean: the box holds the middle half, the whiskers nine tenths.",
    )


def _training(steps: Sequence[dict[str, Any]], whole: int) -> Iterator[Block]:
    yield Figure(
        "training",
        channel_figures.training_steps(
            [s["loss"] for s in steps], [s["operations"] / whole for s in steps]
        ),
        "Training loss and multiply-adds left, over the steps of removal",
        "Units leave after every step; on the right what then is left of the multiply-adds.",
    )


def _steps(steps: Sequence[dict[str, Any]]) -> Table:
    return Table(
        ("step", "top-1 after the cut", "after fine-tuning", "multiply-adds"),
        tuple(
            (str(i), f"{r['top1_cut']:.2%}", f"{r['top1']:.2%}", f"{r['cost']['operations']:,}")
            for i, r in enumerate(steps, 1)
        ),
    )


def _whole(result: dict[str, Any]) -> Table:
    rows = tuple(result["left_whole"].items())
    return Table(("layer", "why it was left whole"), rows, words=(0, 1))
