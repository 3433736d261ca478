"""From scores and a target to a plan: the core's allocators, with a target that channels need.

Channels do not cost alike, so a share of the multiply-adds or of the parameters is met by bisecting
the number of removed units: the fewest whose removal reaches the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moe_fair.core.plan import ModelSize, Plan, Target, make_plan
from moe_fair.core.ranking import depths
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.vision.graph import ChannelGroup
from moe_fair.vision.size import Cost, Sizes


@dataclass(frozen=True)
class Goal:
    """What a plan must reach, in absolute terms: exactly one is set.

    Attributes:
        units: most units kept over all groups.
        operations, parameters: most that the model may have.
        tolerance: ToD's α, no budget.
    """

    units: int | None = None
    operations: int | None = None
    parameters: int | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Rules:
    """How a budget is shared out.

    Attributes:
        allocate: name of an allocator.
        min_units: fewest units kept in a group.
        align: kept counts are multiples of this, in groups that are at least as large.
    """

    allocate: str
    min_units: int = 1
    align: int = 1


def make(
    groups: tuple[ChannelGroup, ...],
    removal: Scores,
    protection: Scores | None,
    sizes: Sizes,
    *,
    rules: Rules,
    goal: Goal,
    recipe: dict[str, Any] | None = None,
) -> Plan:
    """Kept units for a goal.

    Args:
        protection: only where the allocator needs it.

    Raises:
        ValueError: the goal cannot be met; says how far it goes.
    """
    units = tuple(_limited(g.units, rules) for g in groups)

    def at(target: Target) -> Plan:
        return _plan(units, removal, protection, rules, target, sizes)

    if goal.tolerance is not None:
        plan = at(Target(tolerance=goal.tolerance))
    else:
        plan = _within(units, at, goal)
    return replace(plan, recipe=recipe or {})


def _limited(group: UnitGroup, rules: Rules) -> UnitGroup:
    """The group with its floor and multiple; left whole where they allow nothing."""
    floor = max(group.floor, min(rules.min_units, group.size))
    step = math.lcm(rules.align, group.blocks)
    if -(-floor // step) * step > group.size // step * step:
        return replace(group, floor=group.size)
    return replace(group, floor=floor, multiple=rules.align)


def _plan(
    units: tuple[UnitGroup, ...],
    removal: Scores,
    protection: Scores | None,
    rules: Rules,
    target: Target,
    sizes: Sizes,
) -> Plan:
    whole = sizes.whole
    plan = make_plan(
        units,
        removal,
        protection,
        target=target,
        allocator=rules.allocate,
        before=_size(whole),
    )
    cost = sizes.at({g.name: len(g.kept) for g in plan.groups})
    explanation = {
        **plan.explanation,
        "operations_before": whole.operations,
        "operations_after": cost.operations,
    }
    return replace(plan, after=_size(cost), explanation=explanation)


def _size(cost: Cost) -> ModelSize:
    return ModelSize(cost.parameters, 4 * cost.parameters)


def _within(units: tuple[UnitGroup, ...], at: Any, goal: Goal) -> Plan:
    """The plan that removes the fewest units and stays within the goal."""
    total = sum(g.size for g in units)
    most, least = _range(units)

    def try_keep(keep: int) -> Plan | None:
        # groups that go in steps of different sizes do not meet every total: the next lower one
        for k in range(keep, max(least, keep - 64) - 1, -1):
            try:
                return at(Target(total=k))
            except ValueError:
                continue
        return None

    def fits(plan: Plan) -> bool:
        if goal.units is not None:
            return sum(len(g.kept) for g in plan.groups) <= goal.units
        if goal.operations is not None:
            return plan.explanation["operations_after"] <= goal.operations
        assert goal.parameters is not None
        return plan.after.parameters <= goal.parameters

    smallest = try_keep(least)
    if smallest is None or not fits(smallest):
        said = _reached(smallest, goal) if smallest else f"{least} units"
        raise ValueError(
            f"the target is out of reach: with the fewest channels that floors and multiples "
            f"allow {said} remain; ask for less, or lower --min-channels or --align"
        )
    low, high = least, min(most, total if goal.units is None else goal.units)
    best = smallest
    while low < high:  # keep as many as fit: `low` fits
        middle = (low + high + 1) // 2
        plan = try_keep(middle)
        if plan is not None and fits(plan):
            low, best = middle, plan
        else:
            high = middle - 1
    return best


def _reached(plan: Plan, goal: Goal) -> str:
    if goal.operations is not None:
        return f"{plan.explanation['operations_after']:,} multiply-adds"
    if goal.parameters is not None:
        return f"{plan.after.parameters:,} parameters"
    return f"{sum(len(g.kept) for g in plan.groups):,} units"


def _range(units: tuple[UnitGroup, ...]) -> tuple[int, int]:
    """Most and fewest units that floors, blocks and multiples allow."""
    spans = [depths(g) for g in units]
    most = sum(g.size - int(d[0]) for g, d in zip(units, spans, strict=True))
    least = sum(g.size - int(d[-1]) for g, d in zip(units, spans, strict=True))
    return most, least
