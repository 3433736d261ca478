"""What a plan must keep to for the engines of --for, and whether one that is there does."""

from __future__ import annotations

from collections.abc import Sequence

from moe_fair.core.engine_facts import NO, Layout, Wanted, equal_only, verdict, wanted
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import UnitGroup
from moe_fair.pipelines.mtp_heads import UNIFORM


def wanted_by(recipe: Recipe, model_type: str | None, groups: Sequence[UnitGroup]) -> Wanted:
    """What a plan of these groups must keep to; nothing without --for.

    Raises:
        ValueError: no plan is served, or the statistics do not say of what type the model is.
    """
    if not recipe.serve:
        return Wanted()
    if model_type is None:
        raise ValueError(
            "--for: these statistics are of an earlier version and do not say of what type the "
            "model is; calibrate again, or plan without --for and ask `moe-fair check`"
        )
    return wanted(recipe.serve, model_type, max(g.size for g in groups))


def allocator_for(rule: str, serve: Sequence[str] | None, *, named: bool) -> str:
    """The allocator, where engines of --for take equal counts alone one that gives them.

    Args:
        rule: that the method stands for.
        serve: the engines.
        named: it was asked for by name.

    Raises:
        ValueError: it was asked for by name, and gives others.
    """
    only = equal_only(serve or ())
    if not only or rule in UNIFORM:
        return rule
    if named:
        raise ValueError(
            f"--allocate {rule} gives layers different numbers of experts, and {only[0]} (--for) "
            "serves equal ones alone; use uniform, or leave it out"
        )
    return "uniform"


def refusal(recipe: Recipe, error: ValueError) -> ValueError:
    """Why a budget cannot be met, with the engines where they are what it was held to."""
    return ValueError(f"--for {','.join(recipe.serve)}: {error}") if recipe.serve else error


def check_served(recipe: Recipe, plan: Plan, model_type: str) -> None:
    """The engines of --for take a plan that was made before.

    Raises:
        ValueError: one does not; says why.
    """
    for name in recipe.serve or ():
        found = verdict(name, planned_layout(plan, model_type), "OUT")
        if found.serves == NO:
            raise ValueError(
                f"--for {name}: the plan is not served: {found.why}; make it again with "
                f"`moe-fair plan STATISTICS --for {name}`"
            )


def planned_layout(plan: Plan, model_type: str) -> Layout:
    """The layout that a plan leads to."""
    return Layout(model_type, tuple(len(g.kept) for g in plan.groups), equal=plan.uniform)
