"""How far the calibration text carries a plan, in words: see `moe.coverage`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moe_fair.report.document import Block, Table, Text

if TYPE_CHECKING:
    from moe_fair.core.plan import Plan

SHOWN = 12  # domains in a line
BY = {  # the criterion that halves are asked by, in words
    "counterfactual-fisher": "the second order of the loss",
    "taylor-sq": "squared Taylor values",
}
UNSURE = 0.5  # of the way from chance to agreement that halves of the text must go


def coverage_lines(plan: Plan) -> Iterator[Text]:
    """For the screen."""
    found = plan.explanation.get("coverage")
    if not isinstance(found, Mapping):
        return
    if routed := _numbers(found.get("routed")):
        yield Text(f"the router's weight that went to removed experts: {_shares(routed)}")
    if without := _numbers(found.get("without")):
        yield Text(f"removed experts that would go without a domain's text too: {_shares(without)}")
    yield from _halves(found)


def coverage_blocks(plan: Plan) -> Iterator[Block]:
    """For the report."""
    found = plan.explanation.get("coverage")
    if not isinstance(found, Mapping):
        return
    routed, without = _numbers(found.get("routed")), _numbers(found.get("without"))
    if routed or without:
        yield Text(
            "What the plan takes from each domain: the share of the router's weights that went to "
            f"experts that are removed, and of the experts that {plan.removal} ranks lowest the "
            "share that it would rank so without the domain's text too. Where the first is high, "
            "the domain loses the most; where the second is low, the choice rests on that text."
        )
        yield Table(
            ("domain", "weight on removed experts", "same without it"),
            tuple(
                (d, *(f"{v[d]:.1%}" if d in v else "-" for v in (routed, without)))
                for d in dict.fromkeys([*routed, *without])
            ),
        )
    yield from _halves(found)


def _halves(found: Mapping[str, Any]) -> Iterator[Text]:
    known = _numbers({k: found.get(k) for k in ("halves", "chance")})
    if len(known) < 2:
        return
    halves, chance = known.values()
    by = BY.get(str(found.get("halves_by")), BY["taylor-sq"])  # of earlier plans
    yield Text(
        f"by {by}, halves of the text agree on {halves:.0%} of the removed "
        f"experts (by chance {chance:.0%})"
    )
    if halves < chance + UNSURE * (1 - chance):
        yield Text("the text is too little for a firm choice: give more --samples", note=True)


def _numbers(found: Any) -> dict[str, float]:
    """What of it is a number: the plan's file may come from anywhere."""
    if not isinstance(found, Mapping):
        return {}
    return {str(k): v for k, v in found.items() if isinstance(v, (int, float))}


def _shares(found: Mapping[str, float]) -> str:
    """Domains from the highest share to the lowest."""
    order = sorted(found, key=lambda d: (-found[d], d))
    more = f" and {len(order) - SHOWN} more" if len(order) > SHOWN else ""
    return ", ".join(f"{d} {found[d]:.1%}" for d in order[:SHOWN]) + more
