"""What the report of a pruned checkpoint says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from moe_fair.core.allocate import tod
from moe_fair.core.plan import GroupPlan, Plan
from moe_fair.core.ranking import RankedGroup, rank
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.evaluate.drafts import Drafts
from moe_fair.moe.healing_record import Healing
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.report import figures
from moe_fair.report.coverage import coverage_blocks
from moe_fair.report.document import (
    Block,
    Code,
    Document,
    Figure,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from moe_fair.report.numbers import (
    PAIRED_NOTE,
    agreement_table,
    amount,
    benchmark_table,
    change,
    depths,
    drafts_table,
    healing_table,
    heldout_table,
    layer_label,
    method,
    repair_table,
    size_table,
)
from moe_fair.report.serving import serving
from moe_fair.report.sources import Routing, Sources
from moe_fair.report.unrouted import unrouted_line

UNIT = "expert"
MOST_DOMAINS = 12  # in the routing maps


def document(s: Sources) -> Document:
    """The report."""
    kept, size = sum(len(g.kept) for g in s.plan.groups), sum(g.size for g in s.plan.groups)
    return Document(
        title=f"{s.model}: {kept} of {size} {UNIT}s kept",
        subtitle=f"{'Merged' if s.plan.merges else 'Pruned'} with {method(s.plan)}.",
        sections=tuple(
            Section(title, tuple(blocks))
            for title, blocks in (
                ("In short", _summary(s, kept, size)),
                ("Experts kept per layer", _budget(s.plan)),
                ("Tolerance of Difference", _tod(s))
                if s.plan.protection is not None
                else ("Where the cut falls", _ranks(s.plan)),
                ("Scores", _scores(s.plan)),
                ("Which domain uses which experts", _routing(s)),
                *([("Repair", _repair(s.repairs))] if s.repairs else []),
                *([("Healing", _healing(s.healing))] if s.healing else []),
                ("Size", [size_table(s.plan.before, s.plan.after)]),
                ("Held-out loss", _heldout(s)),
                *([("Multi-token prediction", _drafts(s.drafts))] if s.drafts else []),
                ("Agreement with the original", _agreement(s)),
                ("Benchmarks", _benchmarks(s)),
                *([("Serving", serving(s.layout, "OUT"))] if s.layout else []),
                ("Recipe", _recipe(s)),
            )
        ),
    )


def _summary(s: Sources, kept: int, size: int) -> Iterator[Block]:
    before, after = s.plan.before, s.plan.after
    counts = [len(g.kept) for g in s.plan.groups]
    tiles = [
        Tile(f"{UNIT}s kept", f"{kept} of {size}",
             f"{kept / len(counts):.4g} per layer, from {min(counts)} to {max(counts)}"),
        Tile("parameters", amount(after.parameters).strip(),
             f"{change(before.parameters, after.parameters)} from {amount(before.parameters)}"),
        Tile("size on disk", f"{amount(after.bytes)}B",
             f"{change(before.bytes, after.bytes)} from {amount(before.bytes)}B"),
    ]  # fmt: skip
    if s.heldout:
        original, pruned = (h.mean for h in s.heldout)
        tiles.append(
            Tile(
                "held-out loss", f"{pruned - original:+.4f}", f"{original:.4f} to {pruned:.4f} nats"
            )
        )
    if s.agreement:
        a = s.agreement.mean
        tiles.append(Tile("same next token", f"{a.top1:.1%}", f"KL {a.kl:.4f} nats"))
    if s.routing:
        domains = len(s.routing.domains)
        tiles.append(
            Tile("calibration tokens", f"{s.routing.tokens:,}",
                 f"{domains} domain{'s' if domains > 1 else ''}")
        )  # fmt: skip
    yield Tiles(tuple(tiles))
    yield from (Text(note[:1].upper() + note[1:] + ".", note=True) for note in s.plan.notes)


def _budget(plan: Plan) -> Iterator[Block]:
    groups = plan.groups
    null = [g.size - g.null_depth for g in groups if g.null_depth is not None]
    picture = figures.kept_bars(
        [layer_label(g) for g in groups],
        [g.size for g in groups],
        [len(g.kept) for g in groups],
        null if len(null) == len(groups) else None,
        UNIT,
    )
    reading = (
        "Bars: experts kept; grey above them: removed"
        + (" or merged into one that is kept" if plan.merges else "")
        + ". Dashed: the same budget, spread evenly."
    )
    if null:
        reading += (
            " Red: where the tolerance would stop if removal and protection rankings were "
            "independent; where bar and mark agree, ToD carries no signal."
        )
    yield Figure("kept", picture, "Bar chart of experts kept in every layer", reading)
    limits = ("ToD", "null depth", "ceiling") if plan.protection is not None else ()
    yield Table(
        ("layer", "experts", "kept", "removed", *limits),
        tuple(
            (layer_label(g), str(g.size), str(len(g.kept)), str(g.depth),
             *((*depths(g), "-" if g.ceiling is None else str(g.ceiling)) if limits else ()))
            for g in groups
        ),
    )  # fmt: skip


def _tod(s: Sources) -> Iterator[Block]:
    pairs = list(zip(s.plan.groups, _ranked(s), strict=True))
    if any(r.kept(g.depth) != g.kept for g, r in pairs):
        # group-limited routing without the statistics that say so, or ids changed by hand
        yield Text("The kept experts do not follow from the scores alone: there is no ToD to draw.")
        return
    curves = [figures.Curve(f"layer {layer_label(g)}", tod.curve(r), g.depth) for g, r in pairs]
    yield Figure(
        "tod",
        figures.tod_curves(curves, s.plan.tolerance),
        "ToD over the number of removed experts, one panel a layer",
        f"Of the m experts lowest by {s.plan.removal}, the share that is also among the m highest "
        f"by {s.plan.protection}. Low is good: nothing that should stay is on the way out. A curve "
        "along the dashed diagonal says that the two rankings know nothing of each other.",
    )


def _ranks(plan: Plan) -> Iterator[Block]:
    # a head's scores are of another loss, and no threshold is held to them
    groups = [_marked(g, np.array(g.removal)) for g in plan.groups if not g.follows]
    reading = f"Every layer's {UNIT}s in the order of their removal score ({plan.removal})."
    line = None
    if plan.allocator == "global":
        gone = [g.values[list(g.removed)] for g in groups]
        line = float(np.concatenate(gone).max()) if any(g.removed for g in groups) else None
        reading += (
            " One threshold holds for all layers: what lies lowest in the whole model leaves, so "
            "that a layer whose scores rise early keeps more."
        )
    yield Figure(
        "ranks",
        figures.score_ranks(groups, line, UNIT),
        f"Removal scores in rising order, one panel a layer, removed {UNIT}s in red",
        reading,
    )
    yield Text(
        "There are no protection scores in this plan, so there is no Tolerance of Difference to "
        "draw. `moe-fair plan OUT/moe_fair --method fair` with the same target makes a plan that "
        "has them; OUT is this checkpoint, in whose folder moe_fair the statistics lie."
    )


def _ranked(s: Sources) -> list[RankedGroup]:
    """The orders in which the plan's units left and were protected."""
    found = {g.name: g for g in s.routing.groups} if s.routing else {}
    groups = tuple(
        # of a plan without statistics: group-limited routing is not recorded in it
        found.get(g.name, UnitGroup(g.name, g.layer, g.size))
        for g in s.plan.groups
    )
    removal, protection = (
        Scores(
            name or "", {g.name: torch.tensor(values, dtype=torch.float64) for g, values in pairs}
        )
        for name, pairs in (
            (s.plan.removal, [(g, g.removal) for g in s.plan.groups]),
            (s.plan.protection, [(g, g.protection) for g in s.plan.groups]),
        )
    )
    return rank(groups, removal, protection)


def _scores(plan: Plan) -> Iterator[Block]:
    maps = [("removal", plan.removal, [g.removal for g in plan.groups])]
    if plan.protection is not None:
        values = [g.protection for g in plan.groups if g.protection is not None]
        maps.append(("protection", plan.protection, values))
    for kind, name, values in maps:
        marked = [_marked(g, np.array(v)) for g, v in zip(plan.groups, values, strict=True)]
        yield Figure(
            f"scores-{kind}",
            figures.score_map(marked, UNIT),
            f"Heat map of {kind} scores, layers by experts, removed experts marked",
            f"{kind.capitalize()} score ({name}) of every expert, from the lowest to the highest "
            "of its layer; × marks the removed ones.",
        )


def _marked(g: GroupPlan, values: np.ndarray) -> figures.Marked:
    return figures.Marked(layer_label(g), values, sorted(set(range(g.size)) - set(g.kept)))


def _routing(s: Sources) -> Iterator[Block]:
    if s.routing is None:
        yield Text("The statistics are not in this folder: the plan was made elsewhere.")
        return
    shown = s.routing.domains[:MOST_DOMAINS]
    picture = figures.routing_maps(
        [(d, [_marked(g, _use(s.routing, g.name, i)) for g in s.plan.groups])
         for i, d in enumerate(shown)],
        UNIT,
    )  # fmt: skip
    more = len(s.routing.domains) - len(shown)
    yield Figure(
        "routing",
        picture,
        "Heat maps of routed tokens, layers by experts, one a calibration domain",
        "How often each domain's calibration tokens are routed to an expert, against even use of "
        "all experts of the layer. A white dot marks the removed ones."
        + (f" {more} more domains are not drawn." if more else ""),
    )
    yield from coverage_blocks(s.plan)
    if (line := unrouted_line(s.plan.groups, s.routing.use)) is not None:
        yield Text(f"{line}.", note=True)


def _use(routing: Routing, group: str, domain: int) -> np.ndarray:
    """[N] routed tokens of each unit over the group's mean, in one domain."""
    use = routing.use[group][domain].numpy()
    return use / use.mean() if use.any() else np.ones_like(use)


def _repair(repairs: list[LayerRepair]) -> Iterator[Block]:
    yield Text(
        "After the cut the remaining experts (`distill`: router and shared experts as well) were "
        "fitted, layer by layer, to what the original's layers gave on the calibration text. "
        "Squared errors relative to the target's square, on sequences that the fit did not see; a "
        "layer where the fit did not help was left alone."
    )
    yield repair_table(repairs)


def _healing(found: Healing) -> Iterator[Block]:
    done = f"was not kept: {found.refused}" if found.refused else "was kept"
    yield Text(
        "The whole pruned model was then trained toward the original's predictions on "
        f"calibration text, which {done}. Next-token loss and KL from the original in nats, on "
        f"sequences that taught nothing, after {found.steps} steps."
    )
    yield healing_table(found)


def _heldout(s: Sources) -> Iterator[Block]:
    if s.heldout is None:
        yield Text("Not measured: `moe-fair prune` takes text for it with --heldout.")
        return
    yield Text(f"Next-token loss in nats on {s.heldout[0].tokens:,} tokens of held-out text.")
    yield heldout_table(*s.heldout)


def _drafts(drafts: tuple[Drafts, Drafts]) -> Iterator[Block]:
    yield Text(
        "Of the tokens that the MTP head drafts on held-out text, behind the true tokens before "
        "them, the share that the model itself ranks first: what greedy decoding with use_mtp "
        "accepts."
    )
    yield drafts_table(*drafts)


def _agreement(s: Sources) -> Iterator[Block]:
    if s.agreement is None:
        yield Text("Not measured: `moe-fair eval --agreement` does, on any text.")
        return
    yield Text(
        "Position by position on held-out text: KL(original ‖ pruned) in nats, how often both rank "
        "the same token first, and the probability that speculative sampling accepts the one's "
        "token for the other, Σ min(p, q)."
    )
    yield agreement_table(s.agreement)


def _benchmarks(s: Sources) -> Iterator[Block]:
    if s.benchmarks is None:
        yield Text("None was run: `moe-fair eval` runs lm-eval's tasks and adds them here.")
        return
    yield benchmark_table(s.benchmarks)
    if any(r.p is not None for r in s.benchmarks):
        yield Text(PAIRED_NOTE)


def _recipe(s: Sources) -> Iterator[Block]:
    yield Text("Run it again with `moe-fair prune --recipe moe_fair/recipe.yaml -o NEW`.")
    if s.recipe:
        yield Code(s.recipe, "yaml")
    prints = s.plan.fingerprint.items()
    if prints:
        yield Table(("made from", "fingerprint"), tuple((k, v[:16]) for k, v in prints))
