"""How numbers are written, on the screen, in the report and on the model card alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fair.report.document import Table, Text

if TYPE_CHECKING:  # what holds the numbers knows how they are made, with torch
    from moe_fair.core.plan import GroupPlan, ModelSize, Plan
    from moe_fair.evaluate.agreement import Agreements
    from moe_fair.evaluate.compare import Row
    from moe_fair.evaluate.drafts import Drafts
    from moe_fair.evaluate.heldout import HeldoutLoss
    from moe_fair.moe.healing_record import Healing
    from moe_fair.moe.layer_repair import LayerRepair

ARROWS = {True: " ↑", False: " ↓", None: ""}


def amount(n: float) -> str:
    """`14.3 G` style."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.2f} {prefix}"
    return f"{n:.0f} "


def change(before: float, after: float) -> str:
    """`-27.7%`."""
    return f"{after / before - 1:+.1%}"


def layer_label(group: GroupPlan) -> str:
    """The layer's number; of a head for multi-token prediction with what it is."""
    return f"{group.layer} MTP" if group.follows else str(group.layer)


def method(plan: Plan) -> str:
    """`tod on u-score against taylor, tolerance α = 0.12`."""
    scores = plan.removal + (f" against {plan.protection}" if plan.protection else "")
    alpha = "" if plan.tolerance is None else f", tolerance α = {plan.tolerance:.4g}"
    return f"{plan.allocator} on {scores}{alpha}"


def depths(group: GroupPlan) -> tuple[str, str]:
    """ToD at the cut and the null depth, `-` where there is none."""
    tod, null = group.tod, group.null_depth
    return "-" if tod is None else f"{tod:.3f}", "-" if null is None else f"{null:.1f}"


def bar(share: float, columns: int = 20) -> str:
    """A share as a bar of so many characters."""
    full = round(share * columns)
    return "█" * full + "░" * (columns - full)


def clipped(name: str, most: int = 40) -> str:
    """The end of a name that is too long for a screen."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def loading(output: Path, what: str) -> Text:
    """How a pruned image classifier is loaded, and where its report lies."""
    return Text(
        f'{output}: load it with moe_fair.vision.load_pruned("{output}"); '
        f"{output}/moe_fair/report.html shows {what}"
    )


def drafts_table(original: Drafts, pruned: Drafts) -> Table:
    """How many drafted tokens both models accept."""
    return Table(
        ("MTP head", "drafted tokens", "accepted", "acceptance rate"),
        tuple(
            (name, f"{d.drafted:,}", f"{d.accepted:,}", f"{d.rate:.2%}")
            for name, d in (("original", original), ("pruned", pruned))
        ),
    )


def size_table(before: ModelSize, after: ModelSize) -> Table:
    """Parameters and bytes of the whole model."""
    rows = [
        ("parameters", before.parameters, after.parameters, ""),
        ("bytes", before.bytes, after.bytes, "B"),
    ]
    return Table(
        ("size", "original", "pruned", "change"),
        tuple((w, f"{amount(b)}{u}", f"{amount(a)}{u}", change(b, a)) for w, b, a, u in rows),
    )


def heldout_table(original: HeldoutLoss, pruned: HeldoutLoss) -> Table:
    """Next-token loss per domain, in nats."""
    rows = [(d, original.domains[d], pruned.domains[d]) for d in original.domains]
    rows.append(("all", original.mean, pruned.mean))
    return Table(
        ("held-out loss", "original", "pruned", "change"),
        tuple((d, f"{o:.4f}", f"{p:.4f}", f"{p - o:+.4f}") for d, o, p in rows),
    )


def repair_table(repairs: Sequence[LayerRepair]) -> Table:
    """Relative squared errors on held-out sequences, with layers only cut, and repaired."""
    tuned = any(r.epoch for r in repairs)
    more = ("layer error before", "distilled", "epoch kept") if tuned else ()
    return Table(
        ("layer", "repair", "expert error before", "fitted", *more),
        tuple(
            (r.name, r.repair, f"{r.before:.4f}", f"{r.after:.4f}",
             *((f"{r.tuned_before:.4f}", f"{r.tuned_after:.4f}", str(r.epoch)) if tuned else ()))
            for r in repairs
        ),
    )  # fmt: skip


def healing_table(found: Healing) -> Table:
    """Loss and divergence per domain on held-back sequences, repaired and healed."""
    return Table(
        ("healing", "loss before", "after", "KL before", "after"),
        tuple(
            (d, f"{a.loss:.4f}", f"{found.after[d].loss:.4f}", f"{a.kl:.5f}",
             f"{found.after[d].kl:.5f}")
            for d, a in found.before.items()
        ),
    )  # fmt: skip


def agreement_table(found: Agreements) -> Table:
    """Both losses, KL, top-1 agreement and acceptance per domain."""
    return Table(
        ("agreement", "tokens", "original loss", "pruned loss", "KL", "same top-1", "acceptance"),
        tuple(
            (d, f"{a.tokens:,}", f"{a.original_loss:.4f}", f"{a.pruned_loss:.4f}", f"{a.kl:.4f}",
             f"{a.top1:.2%}", f"{a.acceptance:.2%}")
            for d, a in [*found.domains.items(), ("all", found.mean)]
        ),
    )  # fmt: skip


def benchmark_table(rows: Sequence[Row]) -> Table:
    """lm-eval's values; with an original also the paired difference, its error and p."""
    paired = any(r.original is not None for r in rows)
    if not paired:
        return Table(
            ("task", "metric", "items", "value", "± stderr"),
            tuple((*_head(r), _value(r.pruned), _value(r.pruned_stderr)) for r in rows),
        )
    return Table(
        ("task", "metric", "items", "original", "pruned", "difference", "± stderr", "p", "test"),
        tuple(
            (*_head(r), _value(r.original), _value(r.pruned), _value(r.difference, "+"),
             _value(r.stderr), _p(r.p), r.test or "-")
            for r in rows
        ),
    )  # fmt: skip


PAIRED_NOTE = (
    "The standard error is that of the difference, over the same items of both models; p is "
    "two-sided: exact McNemar where items are right or wrong, paired t elsewhere."
)


def _head(r: Row) -> tuple[str, str, str]:
    return "  " * r.depth + r.task, r.metric + ARROWS[r.higher_is_better], f"{r.items:,}"


def _value(x: float | None, sign: str = "") -> str:
    return "-" if x is None else f"{x:{sign}.4f}"


def _p(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
