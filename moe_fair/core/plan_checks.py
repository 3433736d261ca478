"""Whether what stands in a plan's file can be a plan, and whether it is one of this model.

A plan may be written by hand: any ids that rise, meet the plan's own target and leave the size that
it states are a plan. What contradicts itself is refused before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moe_fair.core.layout import common_divisors
from moe_fair.core.plan_parts import GroupPlan, ModelSize, PlanFields
from moe_fair.core.units import UnitGroup

SIZES = ("parameters", "bytes")


def check_plan(plan: PlanFields) -> None:
    """All of it is of its type, and no number contradicts another.

    Raises:
        ValueError: says which.
    """
    _check_types(plan)
    for g in plan.groups:
        _check_group(g)
    _check_kept_counts(plan)


def check_fits(
    plan: PlanFields, groups: Sequence[UnitGroup], before: ModelSize, cut: ModelSize | None = None
) -> None:
    """The plan is of these groups, and the sizes that it states are those of the model.

    Args:
        before: size of the model.
        cut: of what units leave from, where something else leaves before them.

    Raises:
        ValueError: says what differs.
    """
    known, planned = {g.name: g for g in groups}, {g.name: g for g in plan.groups}
    if missing := sorted(set(known) - set(planned)):
        raise ValueError(f"the plan says nothing of {missing[0]}; make it again for this model")
    if strange := sorted(set(planned) - set(known)):
        raise ValueError(f"the plan names {strange[0]}, which this model does not have")
    for name, g in planned.items():
        for what, said, have in (
            ("size", g.size, known[name].size), ("layer", g.layer, known[name].layer)
        ):  # fmt: skip
            if said != have:
                raise ValueError(f"{name}: {what} {said} in the plan, {have} in the model")
    after = (cut or before).without(tuple(groups), {n: len(g.kept) for n, g in planned.items()})
    for when, found, wanted in (("before", plan.before, before), ("after", plan.after, after)):
        if found != wanted:
            raise ValueError(
                f"the plan's ids leave {after.parameters:,} of {before.parameters:,} parameters "
                f"({after.bytes:,} of {before.bytes:,} bytes), and it says {found.parameters:,} "
                f"({found.bytes:,}) {when}: it was changed, or is an earlier version's; plan again"
            )


def _check_types(plan: PlanFields) -> None:
    """What others rely on is of its type; json holds anything."""
    numbers = [g.size for g in plan.groups] + [g.layer for g in plan.groups]
    numbers += [getattr(s, n) for s in (plan.before, plan.after) for n in SIZES]
    if not any(not g.follows for g in plan.groups) or not all(
        type(n) is int and n >= 0 for n in numbers
    ):
        raise ValueError("no groups, or sizes and layers that are not whole numbers")
    if not all(isinstance(g.name, str) and isinstance(g.kept, list) for g in plan.groups):
        raise ValueError("a group without a name or a list of kept ids")
    names = [g.name for g in plan.groups]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    for name in ("fingerprint", "recipe", "explanation", "target"):
        if not isinstance(getattr(plan, name), dict):
            raise ValueError(f"its {name} is not a table")
    for name in ("allocator", "removal"):
        if not isinstance(getattr(plan, name), str):
            raise ValueError(f"its {name} is not a name")
    if plan.mtp not in (None, "cut", "drop", "keep"):
        raise ValueError("its mtp is none of cut, drop, keep")
    if not all(type(g.follows) is bool for g in plan.groups):
        raise ValueError("a group's follows is not true or false")
    if not isinstance(plan.protection, str | None):
        raise ValueError("its protection is not a name")
    if not isinstance(plan.notes, list) or not all(isinstance(n, str) for n in plan.notes):
        raise ValueError("its notes are not texts")
    if plan.tolerance is not None and not _is_number(plan.tolerance):
        raise ValueError("its tolerance is not a number")


def _check_group(g: GroupPlan) -> None:
    if not all(type(i) is int for i in g.kept) or g.kept != sorted(set(g.kept)):
        raise ValueError(f"{g.name}: kept ids must be whole numbers, rising, each once")
    if not g.kept or g.kept[0] < 0 or g.kept[-1] >= g.size:
        raise ValueError(f"{g.name}: kept ids must be one or more of 0..{g.size - 1}")
    for kind, scores in (("removal", g.removal), ("protection", g.protection)):
        if kind == "protection" and scores is None:
            continue
        if not isinstance(scores, list) or not all(map(_is_number, scores)):
            raise ValueError(f"{g.name}: its {kind} scores are not a list of numbers")
        if len(scores) != g.size:
            raise ValueError(f"{g.name}: {len(scores)} {kind} scores of {g.size} units")
    for name in ("tod", "null_depth", "ceiling"):
        value = getattr(g, name)
        whole = name != "ceiling" or type(value) is int
        if value is not None and not (whole and _is_number(value)):
            raise ValueError(f"{g.name}: its {name} is not a number")
    _check_merged(g)


def _check_merged(g: GroupPlan) -> None:
    if not isinstance(g.merged, dict) or not all(isinstance(s, dict) for s in g.merged.values()):
        raise ValueError(f"{g.name}: what is merged is not a table of tables")
    members = [m for shares in g.merged.values() for m in shares]
    known = {str(i) for i in range(g.size)}
    if len(members) != len(set(members)) or not set(members) <= known:
        raise ValueError(f"{g.name}: units are merged that are not there, or twice")
    if not all(k in shares for k, shares in g.merged.items()) or not (
        {str(k) for k in g.kept} >= set(g.merged)
    ):
        raise ValueError(f"{g.name}: units are merged into one that does not stay")
    weights = [w for shares in g.merged.values() for w in shares.values()]
    if not all(_is_number(w) and 0 <= w < math.inf for w in weights):
        raise ValueError(f"{g.name}: units are merged with weights that are not numbers")


def _check_kept_counts(plan: PlanFields) -> None:
    """The counts meet the target and the sizes go with them, as far as a plan alone can tell."""
    counts = [len(g.kept) for g in plan.groups]
    counted = [g for g in plan.groups if not g.follows]
    kept, size = sum(len(g.kept) for g in counted), sum(g.size for g in counted)
    for n in SIZES:
        before, after = getattr(plan.before, n), getattr(plan.after, n)
        if after > before:
            raise ValueError(f"{after:,} {n} and more after the cut than the {before:,} before")
        if counts == [g.size for g in plan.groups] and plan.mtp != "drop" and after != before:
            raise ValueError(f"nothing leaves, and of {before:,} {n} {after:,} stay")
    if plan.expert_parallel not in ([], common_divisors(counts)):
        raise ValueError("its expert_parallel sizes are not those that divide the kept counts")
    for name, value in plan.target.items():
        if not _is_number(value):
            raise ValueError(f"its target {name} is not a number")
        if not _met(plan, name, value, kept, size):
            raise ValueError(
                f"{kept} of {size} units and {plan.after.parameters:,} parameters are not what its "
                f"target asks for ({name} {value:g}): it was changed; plan again"
            )


def _met(plan: PlanFields, name: str, value: float, kept: int, size: int) -> bool:
    if name == "total":
        return kept == value
    if name == "mean_kept":
        return abs(value * sum(not g.follows for g in plan.groups) - kept) < 1e-6
    if name == "ratio":  # where steps forbid it, a note says what is nearest
        gone = size - kept
        nearest = f"{gone} is the nearest that they allow"
        return gone == round(value * size) or any(nearest in n for n in plan.notes)
    return name not in SIZES or getattr(plan.after, name) <= value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)
