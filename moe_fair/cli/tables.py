"""What the commands for language models print: documents for the screen, and JSON for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_fair.cli.render import render
from moe_fair.core.engine_facts import verdicts
from moe_fair.core.layout import layout_of, parallel_sizes
from moe_fair.core.manifest import FOLDER
from moe_fair.engines.auto import auto_name
from moe_fair.engines.stock import read_config
from moe_fair.report.coverage import coverage_lines
from moe_fair.report.document import Block, Code, Table, Text, screen
from moe_fair.report.numbers import (
    PAIRED_NOTE,
    agreement_table,
    amount,
    bar,
    benchmark_table,
    change,
    depths,
    heldout_table,
    layer_label,
    method,
)
from moe_fair.report.serving import serving

if TYPE_CHECKING:
    from moe_fair.core.engine_facts import Layout
    from moe_fair.core.oracle import Agreement, Oracle
    from moe_fair.core.plan import Plan
    from moe_fair.evaluate.agreement import Agreements
    from moe_fair.evaluate.compare import Row
    from moe_fair.pipelines.dry_run import DryRun
    from moe_fair.pipelines.moe import Pruned
    from moe_fair.pipelines.verify import Verified
    from moe_fair.publish.push import Upload

BAR = 24  # columns


def plan_table(plan: Plan) -> None:
    """Per layer: experts kept, ToD at the depth, null depth; overall: sizes, α, notes."""
    header = ("layer", "experts", "kept", "removed", "ToD", "null depth", "kept of all")
    rows = tuple(
        (layer_label(g), str(g.size), str(len(g.kept)), str(g.depth), *depths(g),
         bar(len(g.kept) / g.size, BAR))
        for g in plan.groups
    )  # fmt: skip
    kept, size = sum(len(g.kept) for g in plan.groups), sum(g.size for g in plan.groups)
    each = f"{kept / len(plan.groups):.4g} per layer"
    below: list[Block] = [Text(f"{kept} of {size} experts kept ({each}), {method(plan)}")]
    for what, unit in (("parameters", ""), ("bytes", "B")):
        before, after = (getattr(s, what) for s in (plan.before, plan.after))
        sizes = f"{amount(before)}{unit} -> {amount(after)}{unit}"
        below.append(Text(f"{what}: {sizes} ({change(before, after)})"))
    if plan.expert_parallel:
        below.append(Text(f"expert parallel: {_sizes(plan.expert_parallel)}"))
    below += coverage_lines(plan)
    below += [Text(note, note=True) for note in plan.notes]
    render(screen([Table(header, rows, words=(len(header) - 1,))], below))


def oracle_table(oracle: Oracle, table: Mapping[str, Agreement]) -> None:
    """Correlations of every criterion with the measured loss changes."""
    header = ("criterion", "Pearson", "Spearman", "within layers", "Spearman within")
    rows = tuple(
        (name, *(f"{v:.3f}" for v in (a.pearson, a.spearman, a.pearson_within, a.spearman_within)))
        for name, a in table.items()
    )
    count = sum(len(c) for c in oracle.changes.values())
    text = (
        f"against the loss change of each of {count} experts removed alone, on "
        f"{oracle.tokens:,} tokens (loss {oracle.loss:.4f})"
    )
    render(screen([Table(header, rows)], [Text(text)]))


def pruned_summary(done: Pruned) -> None:
    """Held-out losses and where the result lies."""
    losses = [[heldout_table(done.before, done.after)]] if done.before and done.after else []
    result = read_config(done.output)
    remote = ", trust_remote_code=True" if result.get("moe_fair") else ""
    name = done.output
    ending = [
        Text(f'{name}: load it with {auto_name(result)}.from_pretrained("{name}"{remote})'),
        Text(f"report: {name / FOLDER / 'report.html'}"),
    ]
    served = list(serving(layout_of(result), str(name)))
    render(screen([], *losses, served, ending))  # below the plan, with a line between


def serving_report(layout: Layout, out: str) -> None:
    """Which engines serve a checkpoint, and how."""
    render(screen(list(serving(layout, out))))


def serving_json(layout: Layout, out: str) -> dict[str, Any]:
    """The same, for scripts."""
    return {
        "model_type": layout.model_type,
        "experts": list(layout.counts),
        "equal": layout.equal,
        "expert_parallel": parallel_sizes(layout),
        "engines": [asdict(v) for v in verdicts(layout, out)],
    }


def dry_run_report(found: DryRun) -> None:
    """What a run would do: its checks, memory, disk, and stages with their time."""
    rows = list(found.checks.items())
    rows.append(("engine", f"{found.engine} ({found.why})"))
    for name, sizes in (("memory", found.memory), ("disk", found.disk)):
        rows.append((name, ", ".join(f"{what} {amount(n)}B" for what, n in sizes.items())))
    stages = [(s.name, f"{s.tokens:,}" if s.tokens else "-", s.passes, duration(s.seconds))
              for s in found.stages]  # fmt: skip
    total = ("all", "", "", duration(found.seconds))
    text = (
        f"nothing was written; one layer ({amount(found.bytes_read)}B) was read and timed on "
        "this machine as it is now: expect half to twice the time"
    )
    render(
        screen(
            [Table((), tuple(rows))],
            [
                Table(("stage", "tokens", "passes", "about"), (*stages, total)),
                *(Text(note, note=True) for note in found.notes),
            ],
            [Text(text)],
        )
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
    parts: list[list[Block]] = []
    if rows is not None:
        paired = any(r.p is not None for r in rows)
        parts.append([benchmark_table(rows), *([Text(PAIRED_NOTE)] if paired else [])])
    if found is not None:
        parts.append([agreement_table(found)])
    render(screen(*parts))


def evaluation_json(rows: list[Row] | None, found: Agreements | None) -> dict[str, Any]:
    """The same as `evaluation`, for scripts."""
    return {
        "benchmarks": None if rows is None else [asdict(r) for r in rows],
        "agreement": None if found is None else asdict(found),
    }


def verified(found: Verified) -> None:
    """Every check and what it found."""
    words = {True: "ok", False: "WRONG", None: "-"}
    rows = tuple((c.name, words[c.ok], c.detail) for c in found.checks)
    end = "verified" if found.ok else "does NOT verify; prune again, or download or copy it again"
    render(screen([Table((), rows)], [Text(f"{found.output}: {end}")]))


def verified_json(found: Verified) -> dict[str, Any]:
    """The same as `verified`, for scripts."""
    return {
        "output": str(found.output),
        "ok": found.ok,
        "checks": [asdict(c) for c in found.checks],
    }


def upload(done: Upload) -> None:
    """The files of an upload, or of a dry run with the card's front matter."""
    if done.url is not None:
        render(screen([Text(done.url)]))
        return
    files = [(name, f"{amount(size)}B") for name, size in done.files.items()]
    files.append((f"{len(files)} files to {done.repo_id}", f"{amount(sum(done.files.values()))}B"))
    matter = done.card.split("<!--")[0]
    render(screen([Table(("file", "size"), tuple(files))], [Code(matter, "yaml")]))


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
