"""Experts that stay although nothing was routed to them."""

from __future__ import annotations

import torch

from moe_fair.core.plan import GroupPlan
from moe_fair.report.unrouted import SHOWN, unrouted, unrouted_line


def group(layer: int, kept: list[int]) -> GroupPlan:
    return GroupPlan(f"g{layer}", layer, 4, kept, None, None, None, [0.0] * 4, None)


def test_unrouted() -> None:
    groups = [group(0, [0, 1, 3]), group(1, [0, 2]), group(2, [1])]
    counts = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])  # two domains
    use = {"g0": counts, "g1": counts}  # of g2 nothing is known
    assert unrouted(groups, use) == {"0": [3], "1": [2]}
    line = unrouted_line(groups, use)
    assert line is not None
    assert line.startswith("2 experts stay that no calibration token was routed to")
    assert line.endswith("(ids of the original: layer 0: 3; layer 1: 2)")
    assert unrouted_line(groups[:1], {"g0": torch.ones(1, 4)}) is None


def test_a_line_has_an_end() -> None:
    groups = [group(i, [0]) for i in range(SHOWN + 2)]
    line = unrouted_line(groups, {g.name: torch.zeros(1, 4) for g in groups})
    assert line is not None
    assert line.endswith("; and 2 more layers)")
    many = GroupPlan("g", 3, 20, list(range(20)), None, None, None, [0.0] * 20, None)
    line = unrouted_line([many], {"g": torch.zeros(1, 20)})
    assert line is not None
    assert line.endswith("layer 3: 0, 1, 2, 3, 4, 5, 6, 7 and 12 more)")
