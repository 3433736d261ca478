"""Experts that stay although no calibration token was routed to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from moe_fair.core.plan import GroupPlan
from moe_fair.report.numbers import layer_label

SHOWN = 8  # layers in the line, and experts of each


def unrouted(groups: Sequence[GroupPlan], use: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Layer -> ids that stay and were never used, of layers that have any.

    Args:
        use: group name -> [D, N] how often each unit was used; nothing is known of other groups.
    """
    found = {}
    for g in groups:
        if g.name in use:
            counts = use[g.name].sum(0)
            if ids := [e for e in g.kept if not counts[e]]:
                found[layer_label(g)] = ids
    return found


def unrouted_line(groups: Sequence[GroupPlan], use: Mapping[str, Tensor]) -> str | None:
    """The same in a line; None where there are none."""
    found = unrouted(groups, use)
    if not found:
        return None
    total = sum(map(len, found.values()))
    parts = [f"layer {n}: {_some(ids)}" for n, ids in found.items()]
    more = f"; and {len(parts) - SHOWN} more layers" if len(parts) > SHOWN else ""
    return (
        f"{total} experts stay that no calibration token was routed to; a quantiser that "
        f"calibrates may fail on them (ids of the original: {'; '.join(parts[:SHOWN])}{more})"
    )


def _some(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(map(str, ids[:SHOWN])) + more
