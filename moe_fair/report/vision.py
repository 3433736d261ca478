"""A page that shows what a vision run did: one HTML file with its pictures inside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_fair.core.allocate import tod
from moe_fair.core.plan import GroupPlan, Plan
from moe_fair.core.ranking import rank
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.report.vision_page import STYLE
from moe_fair.report.vision_page import axes as _axes
from moe_fair.report.vision_page import image as _image
from moe_fair.report.vision_page import table as _table


def write_report(path: Path, plans: Sequence[Plan], result: dict[str, Any]) -> None:
    """Write the page.

    Args:
        plans: one for each step; the pictures show the last.
        result: as in `result.json`.
    """
    plan = plans[-1]
    s = result["settings"]
    rows = _facts(result)
    parts = [
        f"<h1>{html.escape(str(s['model']))} pruned on {html.escape(str(s['data']))}</h1>",
        _table(("", "dense", "pruned", "change"), rows),
        "<h2>Latency, median ms per forward</h2>",
        _table(
            ("batch", "dense", "pruned", "speed-up"),
            [_latency(r) for r in result["latency_ms"]],
        ),
        "<h2>Units kept and removed</h2>",
        _image(depth_figure(plan)),
    ]
    if plan.protection is not None:
        parts += [
            "<h2>Tolerance of Difference</h2>",
            "<p class=note>Overlap of the units that would leave and those that are protected "
            "most, against the share removed; the dot is the depth chosen. Dashed: what two "
            "unrelated rankings give.</p>",
            _image(tod_figure(plan)),
        ]
    parts += ["<h2>Scores</h2>", _image(score_figure(plan))]
    if schedule := result["steps"][0].get("removal"):
        whole = result["cost"]["dense"]["operations"]
        parts += ["<h2>Removal while training</h2>", _image(schedule_figure(schedule, whole))]
    if len(plans) > 1:
        parts += [
            "<h2>Steps</h2>",
            _table(
                ("step", "top-1 after the cut", "after fine-tuning", "multiply-adds"),
                [
                    (i, f"{r['top1_cut']:.2%}", f"{r['top1']:.2%}", f"{r['cost']['operations']:,}")
                    for i, r in enumerate(result["steps"], 1)
                ],
            ),
        ]
    if plan.notes:
        parts += ["<h2>Notes</h2>", *(f"<p>{html.escape(n)}</p>" for n in plan.notes)]
    if result["left_whole"]:
        left = _table(("layer", "why it was left whole"), list(result["left_whole"].items()))
        parts += ["<h2>Left whole</h2>", left]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>moe-fair</title><style>{STYLE}"
    path.write_text(f"{head}</style>{''.join(parts)}</html>\n")


def _facts(result: dict[str, Any]) -> list[tuple[str, ...]]:
    top, cost = result["top1"], result["cost"]
    rows: list[tuple[str, ...]] = [
        ("top-1", f"{top['dense']:.2%}", f"{top['final']:.2%}", _points(top))
    ]
    for name, label in (("parameters", "parameters"), ("operations", "multiply-adds")):
        before, after = cost["dense"][name], cost["pruned"][name]
        rows.append((label, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"))
    return rows


def _latency(row: dict[str, float]) -> tuple[str, ...]:
    dense, pruned = row["dense"], row["pruned"]
    return str(row["batch"]), f"{dense:.2f}", f"{pruned:.2f}", f"{dense / pruned:.2f} ×"


def _points(top: dict[str, float]) -> str:
    return f"{100 * (top['final'] - top['dense']):+.2f} points"


def depth_figure(plan: Plan) -> Any:
    """Kept and removed units of every group, with the depth of unrelated rankings."""
    figure, axes = _axes(1, height=max(2.0, 0.22 * len(plan.groups) + 1.2))
    y = np.arange(len(plan.groups))
    kept = np.array([len(g.kept) / g.size for g in plan.groups])
    axes.barh(y, kept, color="#2b6cb0", label="kept")
    axes.barh(y, 1 - kept, left=kept, color="#d9dfe6", label="removed")
    if plan.tolerance is not None:
        null = [1 - (g.null_depth or 0) / g.size for g in plan.groups]
        axes.plot(null, y, "|", color="#c05621", ms=9, mew=2, label="unrelated rankings")
    axes.set_yticks(y, [f"{g.name}  ({g.size})" for g in plan.groups], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(plan.groups) - 0.4, -0.6)
    axes.set_xlabel("share of the group's units")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def tod_figure(plan: Plan) -> Any:
    """ToD against depth, a line for each group."""
    figure, axes = _axes(1, height=3.6)
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(plan.groups)))
    for g, colour in zip(plan.groups, colours, strict=True):
        curve = _curve(g)
        x = np.arange(g.size + 1) / g.size
        axes.plot(x, curve, color=colour, lw=1)
        axes.plot(x[g.depth], curve[g.depth], "o", color=colour, ms=4)
    axes.plot([0, 1], [0, 1], "--", color="#888", lw=1)
    if plan.tolerance is not None:
        axes.axhline(plan.tolerance, color="#c05621", lw=1)
        axes.annotate(
            f"α = {plan.tolerance:.3g}", (0.995, plan.tolerance), ha="right", va="bottom",
            color="#c05621", fontsize=8,
        )  # fmt: skip
    axes.set_xlabel("share of the group removed (dark lines: first layers)")
    axes.set_ylabel("ToD")
    return figure


def score_figure(plan: Plan) -> Any:
    """Distributions of the removal and protection scores, each over its group's mean."""
    kinds = [("removal", plan.removal)]
    if plan.protection is not None:
        kinds.append(("protection", plan.protection))
    figure, found = _axes(len(kinds), height=3.2)
    for axes, (kind, name) in zip(np.atleast_1d(found), kinds, strict=True):
        shares = []
        for g in plan.groups:
            values = np.array(getattr(g, kind), dtype=float)
            mean = np.abs(values).mean()
            shares.append(values / mean if mean > 0 else values)
        axes.boxplot(shares, whis=(5, 95), showfliers=False, widths=0.6)
        axes.set_title(f"{kind}: {name}", fontsize=9)
        axes.set_xlabel("group, in model order")
        step = max(1, len(plan.groups) // 12)
        places = np.arange(1, len(plan.groups) + 1, step)
        axes.set_xticks(places, [str(p - 1) for p in places], fontsize=7)
    np.atleast_1d(found)[0].set_ylabel("score / mean of the group")
    return figure


def schedule_figure(steps: Sequence[dict[str, Any]], whole: int) -> Any:
    """Training loss of every step, and the multiply-adds (of `whole`) that were left after it."""
    figure, (left, right) = _axes(2, height=2.8)
    x = np.arange(len(steps) + 1)
    left.plot(x[1:], [s["loss"] for s in steps], "o-", color="#2b6cb0", lw=1, ms=3)
    left.set_ylabel("training loss")
    right.plot(x, [1.0, *(s["operations"] / whole for s in steps)], color="#2b6cb0", marker=".")
    right.set_ylabel("multiply-adds left after it")
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _curve(g: GroupPlan) -> np.ndarray:
    import torch

    scores = [
        Scores(kind, {g.name: torch.tensor(getattr(g, kind), dtype=torch.float64)})
        for kind in ("removal", "protection")
    ]
    [ranked] = rank((UnitGroup(g.name, g.layer, g.size),), *scores)
    return tod.curve(ranked)
