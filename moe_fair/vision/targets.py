"""What the settings of a pruning run ask of the plan of one of its steps."""

from __future__ import annotations

from moe_fair.vision.plan import Goal, Rules
from moe_fair.vision.settings import Settings
from moe_fair.vision.size import Cost


def rules(settings: Settings) -> Rules:
    """How the budget is shared out."""
    # while training the units of all groups are ranked together
    return Rules(
        "global" if settings.method else settings.allocate, settings.min_channels, settings.align
    )


def goal(settings: Settings, units: int, whole: Cost, step: int) -> Goal:
    """The target after a step: the share that leaves grows evenly from step to step.

    Args:
        units, whole: of the model before the first.
    """
    s, part = settings, step / settings.steps
    if s.ratio is not None:
        return Goal(units=round(units * (1 - s.ratio * part)))
    if s.flops is not None:
        return Goal(operations=int(whole.operations * (1 - s.flops * part)))
    if s.params is not None:
        return Goal(parameters=int(whole.parameters * (1 - s.params * part)))
    return Goal(tolerance=s.tolerance)
