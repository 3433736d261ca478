"""What `moe-fair vision prune` prints."""

from __future__ import annotations

import json

from rich.table import Table

from moe_fair.cli.terminal import console as new_console
from moe_fair.core.plan import Plan
from moe_fair.core.printable import printable
from moe_fair.pipelines.vision import Pruned

BAR = 20  # columns


def show(done: Pruned) -> None:
    """The last plan, what the model costs now, how fast and how good it is."""
    console = new_console()
    plan, result = done.plans[-1], done.result
    console.print(_groups(plan))
    units, kept = sum(g.size for g in plan.groups), sum(len(g.kept) for g in plan.groups)
    scores = plan.removal + (f" against {plan.protection}" if plan.protection else "")
    alpha = f", tolerance α = {plan.tolerance:.4g}" if plan.tolerance is not None else ""
    last = " in the last step" if len(done.plans) > 1 else ""
    console.print(
        f"\n{kept:,} of {units:,} units kept{last}, {plan.allocator} on {scores}{alpha}",
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(f"note: {printable(note)}", soft_wrap=True)
    cost, top = result["cost"], result["top1"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "dense", "pruned", "change"):
        table.add_column(name, justify="right" if name else "left")
    for name, label in (("parameters", "parameters"), ("operations", "multiply-adds")):
        before, after = cost["dense"][name], cost["pruned"][name]
        table.add_row(label, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
    table.add_row(
        "top-1", f"{top['dense']:.2%}", f"{top['final']:.2%}",
        f"{100 * (top['final'] - top['dense']):+.2f} points",
    )  # fmt: skip
    for row in result["latency_ms"]:
        table.add_row(
            f"ms at batch {row['batch']}", f"{row['dense']:.2f}", f"{row['pruned']:.2f}",
            f"{row['dense'] / row['pruned']:.2f} × as fast",
        )  # fmt: skip
    console.print()
    console.print(table)
    if top["pruned"] != top["final"]:
        console.print(f"top-1 before the last fine-tuning: {top['pruned']:.2%}")
    name = printable(done.output)
    console.print(
        f'\n{name}: load it with moe_fair.vision.load_pruned("{name}"); '
        f"{name}/moe_fair/report.html shows the scores",
        soft_wrap=True,
    )


def as_json(done: Pruned) -> str:
    """The result for scripts."""
    plan = done.plans[-1]
    kept = {g.name: len(g.kept) for g in plan.groups}
    return json.dumps({"output": str(done.output), "kept": kept, **done.result}, indent=1)


def _groups(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("group", "units", "kept", "removed", "ToD", "null depth", "kept of all"):
        table.add_column(name, justify="left" if name in ("group", "kept of all") else "right")
    for g in plan.groups:
        full = round(len(g.kept) / g.size * BAR)
        table.add_row(
            printable(g.name if len(g.name) <= 40 else "…" + g.name[-39:]),
            str(g.size),
            str(len(g.kept)),
            str(g.depth),
            "-" if g.tod is None else f"{g.tod:.3f}",
            "-" if g.null_depth is None else f"{g.null_depth:.1f}",
            "█" * full + "░" * (BAR - full),
        )
    return table
