"""What a run prints on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moe_fair.cli.terminal import console as new_console
from moe_fair.core.printable import printable
from moe_fair.engines.auto import auto_name
from moe_fair.engines.stock import read_config
from moe_fair.report import document
from moe_fair.report.numbers import (
    PAIRED_NOTE,
    agreement_table,
    amount,
    benchmark_table,
    heldout_table,
    layer_label,
)
from moe_fair.report.sources import FOLDER

if TYPE_CHECKING:
    from rich.console import Console

    from moe_fair.core.oracle import Agreement, Oracle
    from moe_fair.core.plan import Plan
    from moe_fair.evaluate.agreement import Agreements
    from moe_fair.evaluate.compare import Row
    from moe_fair.pipelines.dry_run import DryRun
    from moe_fair.pipelines.moe import Pruned
    from moe_fair.pipelines.verify import Verified
    from moe_fair.publish.push import Upload

BAR = 24  # columns
MOST_COLUMNS = 1000  # of a table


def plan_table(plan: Plan) -> None:
    """Per layer: experts kept, ToD at the depth, null depth; overall: sizes, α, notes."""
    console = new_console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "experts", "kept", "removed", "ToD", "null depth"):
        table.add_column(name, justify="right")
    table.add_column("kept of all", justify="left")
    for g in plan.groups:
        table.add_row(
            layer_label(g),
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
        console.print(f"note: {printable(note)}", soft_wrap=True)


def oracle_table(oracle: Oracle, table: Mapping[str, Agreement]) -> None:
    """Correlations of every criterion with the measured loss changes."""
    console = new_console()
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
    console = new_console()
    if done.before and done.after:
        console.print()
        _print(console, heldout_table(done.before, done.after))
    result = read_config(done.output)
    remote = ", trust_remote_code=True" if result.get("moe_fair") else ""
    name = printable(done.output)
    console.print(
        f"\n{name}: load it with "
        f'{auto_name(result)}.from_pretrained("{name}"{remote})\n'
        f"report: {printable(done.output / FOLDER / 'report.html')}",
        soft_wrap=True,
    )


def dry_run_report(found: DryRun) -> None:
    """What a run would do: its checks, memory, disk, and stages with their time."""
    console = new_console()
    rows = list(found.checks.items())
    rows.append(("engine", f"{found.engine} ({found.why})"))
    for name, sizes in (("memory", found.memory), ("disk", found.disk)):
        rows.append((name, ", ".join(f"{what} {amount(n)}B" for what, n in sizes.items())))
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # a name is not markup
    console.print(table)
    console.print()
    stages = [(s.name, f"{s.tokens:,}" if s.tokens else "-", s.passes, duration(s.seconds))
              for s in found.stages]  # fmt: skip
    total = ("all", "", "", duration(found.seconds))
    header = ("stage", "tokens", "passes", "about")
    _print(console, document.Table(header, (*stages, total)))
    for note in found.notes:
        console.print(f"note: {printable(note)}", soft_wrap=True, markup=False)
    console.print(
        f"\nnothing was written; one layer ({amount(found.bytes_read)}B) was read and timed on "
        "this machine as it is now: expect half to twice the time",
        soft_wrap=True,
    )


def duration(seconds: float | None) -> str:
    """`3.2 s`, `14 min`, `6.5 h`."""
    if seconds is None:
        return "-"
    if seconds < 300:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def evaluation(rows: list[Row] | None, found: Agreements | None) -> None:
    """Benchmarks and agreement, whichever were measured."""
    console = new_console()
    if rows is not None:
        _print(console, benchmark_table(rows))
        if any(r.p is not None for r in rows):
            console.print(PAIRED_NOTE, soft_wrap=True)
    if found is not None:
        if rows is not None:
            console.print()
        _print(console, agreement_table(found))


def evaluation_json(rows: list[Row] | None, found: Agreements | None) -> dict[str, Any]:
    """The same as `evaluation`, for scripts."""
    return {
        "benchmarks": None if rows is None else [asdict(r) for r in rows],
        "agreement": None if found is None else asdict(found),
    }


def verified(found: Verified) -> None:
    """Every check and what it found."""
    console = new_console()
    words = {True: "ok", False: "WRONG", None: "-"}
    rows = tuple((c.name, words[c.ok], c.detail) for c in found.checks)
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)
    end = "verified" if found.ok else "does NOT verify; prune again, or download or copy it again"
    console.print(f"\n{printable(found.output)}: {end}", soft_wrap=True)


def verified_json(found: Verified) -> dict[str, Any]:
    """The same as `verified`, for scripts."""
    return {
        "output": str(found.output),
        "ok": found.ok,
        "checks": [asdict(c) for c in found.checks],
    }


def upload(done: Upload) -> None:
    """The files of an upload, or of a dry run with the card's front matter."""
    console = new_console()
    if done.url is not None:
        console.print(printable(done.url), soft_wrap=True)
        return
    files = [(name, f"{amount(size)}B") for name, size in done.files.items()]
    files.append((f"{len(files)} files to {done.repo_id}", f"{amount(sum(done.files.values()))}B"))
    _print(console, document.Table(("file", "size"), tuple(files)))
    console.print(f"\n{done.card.split('<!--')[0]}", soft_wrap=True)


def _print(console: Console, made: document.Table) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(made.header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in made.rows:
        table.add_row(*map(printable, row))
    # a terminal that is too narrow breaks the lines; a pipe has no width: no number is cut short
    unbounded = console.options.update(width=MOST_COLUMNS)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(table)


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


def _sizes(sizes: list[int]) -> str:
    if sizes == [1]:
        return "no number of devices divides every layer evenly (--multiple-of 8 makes 8 do so)"
    return f"{', '.join(map(str, sizes))} devices divide every layer evenly"


def _bar(share: float) -> str:
    full = round(share * BAR)
    return "█" * full + "░" * (BAR - full)
