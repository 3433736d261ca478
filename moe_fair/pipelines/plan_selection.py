"""Trying plans before one is taken: the method's own and its rivals', on text that no score saw.

A score is an estimate, and which estimate is best depends on the model: where experts are balanced
and alike, those with gradients follow the calibration text too closely (eval/LAB.md). So the loss
without each plan's experts is measured on calibration sequences that were held back from the
statistics, and the plan that loses least is taken. The standard errors in what is told of a trial
are those of the difference to the method's own plan, paired by sequences.

What counts is what stays after the repair. Where the result is fitted, so is each plan before it is
judged (`moe.repaired_trial`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_fair.core.allocate import allocator, needs
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import TARGETS, Recipe
from moe_fair.core.say import Say
from moe_fair.core.units import Statistics
from moe_fair.engines.layer_calls import NotLayerwise, check_layerwise
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.checks import check_plan_settings
from moe_fair.pipelines.collection import check_needs
from moe_fair.pipelines.methods import method, method_name
from moe_fair.pipelines.oom_retry import NothingSmaller
from moe_fair.pipelines.rivals import rivals
from moe_fair.pipelines.trial_losses import losses_of
from moe_fair.pipelines.trial_text import sequence_weights


@dataclass(frozen=True)
class Tried:
    """One plan's trial.

    Attributes:
        name: of the method.
        plan: what it keeps.
        change: of the mean loss on the held-back text, in nats.
        stderr: of the difference to the first plan's change; 0 for the first itself.
    """

    name: str
    plan: Plan
    change: float = math.nan
    stderr: float = 0.0


def check_rivals(recipe: Recipe, source: Checkpoint) -> None:
    """Every rival that was named can be tried, and meets the target, where there is one.

    Raises:
        ValueError: one is not; says which.
    """
    if recipe.rivals is not None and rivals(recipe):
        try:
            check_layerwise(source.skeleton, several=True)
        except NotLayerwise as e:
            raise ValueError(f"--rivals {','.join(recipe.rivals)}: {e}") from e
    targeted = any(getattr(recipe, t) is not None for t in TARGETS)  # `calibrate` has none
    for name, its in rivals(recipe).items():
        try:
            if needs(allocator(method(its)[2]), "costs"):
                raise ValueError("it needs measured costs, which rivals are not given")
            if recipe.rivals is not None and targeted:
                check_plan_settings(its, source)
                check_needs(its)
        except ValueError as e:
            raise ValueError(f"--rivals {name}: {e}") from e


def best_plan(
    make: Callable[[Statistics, Recipe], Plan],
    recipe: Recipe,
    source: Checkpoint,
    statistics: Statistics,
    text: CalibrationSet,
    home: Path,
    say: Say = lambda _: None,
    *,
    teaching: CalibrationSet | None = None,
) -> Plan:
    """The method's own plan, or a rival's that loses less on a text.

    Args:
        make: statistics and recipe -> plan.
        text: what the statistics have not seen.
        home, teaching: see `try_plans`.

    The statistics are there: whatever fails now, what was made of them is a plan as well.
    """
    name = recipe.planning().get("method") or method_name(recipe)
    made = [Tried(name, make(statistics, recipe))]
    for name, its in rivals(recipe).items():
        try:
            made.append(Tried(name, make(statistics, its)))
        except ValueError as e:
            say(f"note: {name} is not tried: {e}")
    try:
        return try_plans(recipe, source, text, made, home, say, teaching=teaching)
    except ValueError as e:
        note = f"no plan is tried against another's: {e}"
        say(f"note: {note}")
        return replace(made[0].plan, notes=[*made[0].plan.notes, note])


def try_plans(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Tried],
    home: Path,
    say: Say = lambda _: None,
    *,
    teaching: CalibrationSet | None = None,
) -> Plan:
    """The best of some plans by the loss on a text.

    Args:
        plans: the method's own first.
        home: file for the measured losses; a run that was killed finds them there.
        teaching: what plans are repaired on first, see `teaching_text`.

    Returns:
        the plan, with what was measured in its `explanation` and its notes.
    """
    different = _different(plans)
    if len(different) < 2:
        return plans[0].plan
    if int((sequence_weights(recipe, text) > 0).sum()) < 2:
        say("note: no plan is tried: the held-back text is of domains whose weight is 0")
        return plans[0].plan
    found = None
    if teaching is not None:
        try:
            found = _measured(recipe, source, text, different, home, say, teaching)
        except (NotLayerwise, NothingSmaller) as e:
            say(f"note: plans are tried before any repair: {e}")
    try:
        tried, about = found or _measured(recipe, source, text, different, home, say)
    except NothingSmaller as e:  # the statistics are there: what was made of them is a plan as well
        note = f"no plan was tried against another's: out of memory ({e})"
        say(f"note: {note}")
        return replace(plans[0].plan, notes=[*plans[0].plan.notes, note])
    best = best_of(tried)
    shown = ", ".join(f"{t.name} {t.change:+.4f}" for t in sorted(tried, key=lambda t: t.change))
    how = f"each repaired on {about['taught']}" if "taught" in about else "before any repair"
    note = (
        f"tried on {about['sequences']} held-back sequences, {how}: {shown}; {best.name} was taken"
    )
    explanation = {**best.plan.explanation, "trials": {**about, "taken": best.name}}
    return replace(best.plan, explanation=explanation, notes=[*best.plan.notes, note])


def _measured(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Tried],
    home: Path,
    say: Say,
    teaching: CalibrationSet | None = None,
) -> tuple[list[Tried], dict[str, Any]]:
    """Each plan with its change, and what a plan's explanation says of it."""
    weights = sequence_weights(recipe, text)
    seen = weights > 0  # what --weights leaves out tells nothing, of the spread neither
    losses, counts = losses_of(recipe, source, text, [t.plan for t in plans], home, say, teaching)
    losses, counts, weights = (losses * weights)[:, seen], counts[seen], weights[seen]
    tokens = float(counts @ weights)
    tried = [
        replace(t, change=_change(losses[p], losses[0], tokens),
                stderr=_stderr(losses[p] - losses[1], tokens))
        for p, t in enumerate(plans, 1)
    ]  # fmt: skip
    about = {
        "sequences": len(counts), "tokens": int(counts.sum()),
        "loss": float(losses[0].sum()) / tokens,
        "changes": {t.name: t.change for t in tried},
        "stderr": {t.name: t.stderr for t in tried},
    }  # fmt: skip
    return tried, about if teaching is None else {**about, "taught": len(teaching.sequences)}


def best_of(tried: Sequence[Tried]) -> Tried:
    """The one that loses least; of those that lose as little, the first.

    The method's own plan has no head start: where a standard error was asked of a rival, it stood
    in two of ten trials, and these were the two worst results (eval/LAB.md).
    """
    return min(tried, key=lambda t: t.change)


def _different(plans: Sequence[Tried]) -> list[Tried]:
    """Without those that keep what an earlier one keeps."""
    found: list[Tried] = []
    for t in plans:
        if all(t.plan.kept != other.plan.kept for other in found):
            found.append(t)
    return found


def _change(losses: Tensor, base: Tensor, tokens: float) -> float:
    return float((losses - base).sum()) / tokens


def _stderr(difference: Tensor, tokens: float) -> float:
    """Standard error of the mean difference a token, from its spread over the sequences."""
    n = len(difference)
    spread = float((difference - difference.mean()).square().sum())
    return math.sqrt(n / (n - 1) * spread) / tokens
