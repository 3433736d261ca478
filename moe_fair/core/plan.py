"""A plan: which units of every group stay, and every number that explains why."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_fair.core.allocate import allocator as find_allocator
from moe_fair.core.allocate import tod
from moe_fair.core.allocate.climb import nearest_total, totals
from moe_fair.core.equal_counts import equal_count
from moe_fair.core.layout import common_divisors
from moe_fair.core.made_files import find_plan
from moe_fair.core.output import write_named
from moe_fair.core.plan_checks import check_plan
from moe_fair.core.plan_parts import GroupPlan as GroupPlan
from moe_fair.core.plan_parts import ModelSize as ModelSize
from moe_fair.core.plan_parts import PlanFields
from moe_fair.core.plan_parts import Target as Target
from moe_fair.core.ranking import RankedGroup, depths, rank
from moe_fair.core.units import Budget, Scores, UnitGroup

PLAN_FORMAT = "moe_fair.plan/1"
TOO_LARGE = (RecursionError, OverflowError)  # lists within lists, numbers of 400 digits


@dataclass(frozen=True)
class Plan(PlanFields):
    """Kept ids per group, and what led to them. The same inputs give the same bytes."""

    def to_json(self) -> str:
        """The plan as JSON text, byte for byte the same for the same plan."""
        # `vars` of its parts as they are met: `asdict` would copy every score first
        plain = {"format": PLAN_FORMAT, **vars(self)}
        return json.dumps(plain, indent=1, sort_keys=True, default=vars) + "\n"

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        write_named(path, self.to_json())

    @staticmethod
    def load(path: Path) -> Plan:
        """Read and check a plan.

        Raises:
            ValueError: no such file, not a plan, or ids that cannot be.
        """
        file = find_plan(path)
        try:
            raw = json.loads(file.read_text())
            if raw.pop("format") != PLAN_FORMAT:
                raise ValueError("another format version")
            groups = [GroupPlan(**g) for g in raw.pop("groups")]
            before, after = ModelSize(**raw.pop("before")), ModelSize(**raw.pop("after"))
            plan = Plan(groups=groups, before=before, after=after, **raw)
            check_plan(plan)
            Target(**raw["target"])
        except (ValueError, KeyError, TypeError, AttributeError, *TOO_LARGE) as e:
            raise ValueError(f"{path} is not a moe_fair plan: {e}") from e
        return plan


def make_plan(
    groups: tuple[UnitGroup, ...],
    removal: Scores,
    protection: Scores | None,
    *,
    target: Target,
    allocator: str,
    before: ModelSize,
    min_units: int = 0,
    multiple_of: int = 1,
    counts: Collection[int] | None = None,
    equal: bool = False,
    costs: Mapping[str, np.ndarray] | None = None,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Plan:
    """Scores and a target in, kept ids out.

    Args:
        before: size of the whole model, from which the size afterwards follows.
        min_units, multiple_of, counts, costs, inputs: see `ranking.rank`.
        equal: all groups keep the same number, whatever the allocator.

    Raises:
        ValueError: the target cannot be met; says why.
    """
    rule = find_allocator(allocator)
    allocated = tuple(g for g in groups if not g.follows)
    if equal:
        each = [depths(g, min_units, multiple_of, counts) for g in groups]
        counts = {equal_count(groups, each, target, before)}
    ranked = rank(
        allocated, removal, protection, min_units=min_units, multiple_of=multiple_of, counts=counts,
        costs=costs, inputs=inputs,
    )  # fmt: skip
    following = rank(
        tuple(g for g in groups if g.follows), removal, protection, min_units=min_units,
        multiple_of=multiple_of, counts=counts,
    )  # fmt: skip

    def allocate(remove: int | None = None, tolerance: float | None = None) -> Budget:
        return _followed(rule.allocate(ranked, remove=remove, tolerance=tolerance), following)

    size = sum(g.size for g in allocated)
    if target.tolerance is not None:
        budget = allocate(tolerance=target.tolerance)
    elif target.parameters is not None or target.bytes is not None:
        budget = _within_size(ranked, allocate, groups, before, target)
    else:
        remove = size - _total(target, allocated)
        if target.ratio is not None:  # any other target is a number that is meant exactly
            wanted = remove
            remove = totals(ranked)[0] if equal else nearest_total(ranked, target.ratio)
        budget = allocate(remove)
    plan = _explain([*ranked, *following], budget, removal, protection, target, before)
    if target.ratio is not None and remove != wanted:
        note = (
            f"a share of {target.ratio:g} is {wanted} of {size}; kept counts go in steps, and "
            f"{remove} is the nearest that they allow"
        )
        plan = replace(plan, notes=[*plan.notes, note])
    return replace(plan, fingerprint=dict(fingerprint or {}), recipe=dict(recipe or {}))


def _followed(budget: Budget, following: list[RankedGroup]) -> Budget:
    """The budget with what follows it: the mean of what is allocated, to the nearest allowed."""
    mean = sum(budget.kept.values()) / len(budget.kept)
    kept = dict(budget.kept)
    for r in following:
        counts = (r.group.size - r.depths).tolist()  # falling: of two as near the larger
        kept[r.group.name] = min(counts, key=lambda n: abs(n - mean))
    return replace(budget, kept=kept)


def _total(target: Target, groups: tuple[UnitGroup, ...]) -> int:
    """Units kept over all groups."""
    size = sum(g.size for g in groups)
    if target.total is not None:
        return target.total
    if target.ratio is not None:
        return size - round(target.ratio * size)
    assert target.mean_kept is not None
    total = target.mean_kept * len(groups)
    if abs(total - round(total)) > 1e-6:
        low, high = (int(total + i) / len(groups) for i in (0, 1))
        raise ValueError(
            f"--experts {target.mean_kept:g} over {len(groups)} layers is {total:g} experts, not a "
            f"whole number; the nearest are {low:.6g} and {high:.6g} (or give --total)"
        )
    return round(total)


def _within_size(
    ranked: list[RankedGroup],
    allocate: Callable[[int], Budget],
    groups: tuple[UnitGroup, ...],
    before: ModelSize,
    target: Target,
) -> Budget:
    """The budget that keeps the most units while the model fits: more removed, a smaller model."""
    limit = target.parameters if target.parameters is not None else target.bytes
    unit = "parameters" if target.parameters is not None else "bytes"
    possible = totals(ranked)

    def at(index: int) -> Budget:
        return allocate(possible[index])

    def fits(budget: Budget) -> bool:
        return getattr(before.without(groups, budget.kept), unit) <= limit

    low, high = 0, len(possible) - 1
    if not fits(at(high)):
        smallest = getattr(before.without(groups, at(high).kept), unit)
        raise ValueError(
            f"--size {limit:,} {unit} is out of reach: with the fewest experts that routing allows "
            f"the model still has {smallest:,} {unit}"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(at(middle)) else (middle + 1, high)
    return at(low)


def _explain(
    ranked: list[RankedGroup],
    budget: Budget,
    removal: Scores,
    protection: Scores | None,
    target: Target,
    before: ModelSize,
) -> Plan:
    groups = tuple(r.group for r in ranked)
    ranked = [
        replace(r, removal_order=budget.orders.get(r.group.name, r.removal_order)) for r in ranked
    ]
    curves = [tod.curve(r) if r.protection_order is not None else None for r in ranked]
    depths = [r.group.size - budget.kept[r.group.name] for r in ranked]
    tods = [None if c is None else float(c[m]) for c, m in zip(curves, depths, strict=True)]
    alpha = _tolerance(budget, tods)
    plans = [
        GroupPlan(
            name=r.group.name,
            layer=r.group.layer,
            size=r.group.size,
            kept=r.kept(m),
            tod=t,
            null_depth=None if alpha is None else tod.null_depth(r.group.size, alpha),
            ceiling=None if alpha is None else tod.ceiling(r.group.size, alpha),
            removal=r.removal.tolist(),
            protection=None if r.protection is None else r.protection.tolist(),
            follows=r.group.follows,
        )
        for r, m, t in zip(ranked, depths, tods, strict=True)
    ]
    return Plan(
        groups=plans,
        allocator=budget.allocator,
        removal=removal.criterion,
        protection=protection.criterion if protection else None,
        tolerance=alpha,
        explanation=budget.explanation,
        target={k: v for k, v in asdict(target).items() if v is not None},
        before=before,
        after=before.without(groups, budget.kept),
        notes=_notes(plans, budget, alpha),
        expert_parallel=common_divisors([len(p.kept) for p in plans]),
    )


def _tolerance(budget: Budget, tods: list[float | None]) -> float | None:
    """The tolerance at which every group's depth is allowed: what was asked, or what it took."""
    if not {"tolerance", "tolerance_below"} & budget.explanation.keys():
        return None
    given = budget.explanation.get("tolerance")
    return (
        float(given) if given is not None else max((t for t in tods if t is not None), default=0.0)
    )


def _notes(plans: list[GroupPlan], budget: Budget, alpha: float | None) -> list[str]:
    """What a reader must know before trusting the budget."""
    if alpha is None:
        return []
    notes = []
    size, depth = sum(p.size for p in plans), sum(p.depth for p in plans)
    share = depth / size
    if "tolerance_below" in budget.explanation:
        if budget.explanation["tolerance_below"] is None:
            mass = "the removed share of each layer's U-mass"
            deciding = mass if budget.allocator == tod.name else "the measured costs"
            notes.append(
                "the two rankings agree so far that even tolerance 0 removes more than the budget: "
                f"{deciding} decided all of it"
            )
        elif added := sum(budget.explanation["added_by_fill"].values()):
            notes.append(
                f"tolerance {budget.explanation['tolerance_below']:.4g} removes "
                f"{depth - added}; the layers with the least ToD at their next depth gave the "
                f"other {added}"
            )
        if share > 0.5:
            notes.append(
                f"removing {share:.1%} lies above the ceiling 1/(2 - α) of every tolerance below "
                f"{2 - 1 / share:.3f}: part of the overlap is forced by counting"
            )
    bound = [p.layer for p in plans if p.depth and p.depth >= (p.ceiling or 0)]
    if bound:
        notes.append(
            f"the ceiling N/(2 - α) binds in layer{'s' if len(bound) > 1 else ''} "
            f"{', '.join(map(str, bound))}"
        )
    return notes
