"""What a run prints on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_fair.core.oracle import Agreement, Oracle
from moe_fair.core.plan import Plan
from moe_fair.engines.auto import auto_class
from moe_fair.moe.load import Checkpoint
from moe_fair.pipeline import Pruned

BAR = 24  # columns


def plan_table(plan: Plan) -> None:
    """Per layer: experts kept, ToD at the depth, null depth; overall: sizes, α, notes."""
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "experts", "kept", "removed", "ToD", "null depth"):
        table.add_column(name, justify="right")
    table.add_column("kept of all", justify="left")
    for g in plan.groups:
        table.add_row(
            str(g.layer),
            str(g.size),
            str(len(g.kept)),
            str(g.depth),
            "-" if g.tod is None else f"{g.tod:.3f}",
            "-" if g.null_depth is None else f"{g.null_depth:.1f}",
            _bar(len(g.kept) / g.size),
        )
    console.print(table)
    kept, size = sum(len(g.kept) for g in plan.groups), sum(g.size for g in plan.groups)
    scores = plan.removal + (f" against {plan.protection}" if plan.protection else "")
    console.print(
        f"\n{kept} of {size} experts kept ({kept / len(plan.groups):.4g} per layer), "
        f"{plan.allocator} on {scores}"
        + (f", tolerance α = {plan.tolerance:.4g}" if plan.tolerance is not None else ""),
        soft_wrap=True,
    )
    for what, unit in (("parameters", ""), ("bytes", "B")):
        before, after = (getattr(s, what) for s in (plan.before, plan.after))
        console.print(
            f"{what}: {amount(before)}{unit} -> {amount(after)}{unit} ({after / before - 1:+.1%})"
        )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def oracle_table(oracle: Oracle, table: Mapping[str, Agreement]) -> None:
    """Correlations of every criterion with the measured loss changes."""
    console = Console(highlight=False)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("criterion", "Pearson", "Spearman", "within layers", "Spearman within"):
        shown.add_column(name, justify="left" if name == "criterion" else "right")
    for name, a in table.items():
        values = (a.pearson, a.spearman, a.pearson_within, a.spearman_within)
        shown.add_row(name, *(f"{v:.3f}" for v in values))
    console.print(shown)
    count = sum(len(c) for c in oracle.changes.values())
    console.print(
        f"\nagainst the loss change of each of {count} experts removed alone, on "
        f"{oracle.tokens:,} tokens (loss {oracle.loss:.4f})",
        soft_wrap=True,
    )


def pruned_summary(done: Pruned) -> None:
    """Held-out losses and where the result lies."""
    console = Console(highlight=False)
    if done.before and done.after:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("held-out loss", "original", "pruned", "change"):
            table.add_column(name, justify="left" if name == "held-out loss" else "right")
        rows = [(d, done.before.domains[d], done.after.domains[d]) for d in done.before.domains]
        for name, b, a in [*rows, ("all", done.before.mean, done.after.mean)]:
            table.add_row(name, f"{b:.4f}", f"{a:.4f}", f"{a - b:+.4f}")
        console.print()
        console.print(table)
    result = Checkpoint(str(done.output))
    remote = ", trust_remote_code=True" if result.trust_remote_code else ""
    console.print(
        f"\n{done.output}: load it with "
        f'{auto_class(result.config).__name__}.from_pretrained("{done.output}"{remote})',
        soft_wrap=True,
    )


def pruned_json(done: Pruned) -> dict[str, Any]:
    """The same as `pruned_summary`, for scripts."""
    return {
        "output": str(done.output),
        "kept": {g.name: len(g.kept) for g in done.plan.groups},
        "before": asdict(done.plan.before),
        "after": asdict(done.plan.after),
        "heldout": {"original": asdict(done.before), "pruned": asdict(done.after)}
        if done.before and done.after
        else None,
    }


def amount(n: float) -> str:
    """`14.3 G` style."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.2f} {prefix}"
    return f"{n:.0f} "


def _bar(share: float) -> str:
    full = round(share * BAR)
    return "█" * full + "░" * (BAR - full)
