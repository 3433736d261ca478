"""What a run prints on the screen."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_fair.core.plan import Plan
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
    if plan.expert_parallel:
        console.print(f"expert parallel: {_sizes(plan.expert_parallel)}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


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
    remote = "" if done.plan.uniform else ", trust_remote_code=True"
    console.print(
        f"\n{done.output}: load it with "
        f'AutoModelForCausalLM.from_pretrained("{done.output}"{remote})',
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


def _sizes(sizes: list[int]) -> str:
    if sizes == [1]:
        return "no number of devices divides every layer evenly (--multiple-of 8 makes 8 do so)"
    return f"{', '.join(map(str, sizes))} devices divide every layer evenly"


def _bar(share: float) -> str:
    full = round(share * BAR)
    return "█" * full + "░" * (BAR - full)
