"""Measuring what removals cost, of experts alone and of a layer's first so many: loss changes on a
share of the calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_fair.core.cost_curves import attach, depths_to_measure
from moe_fair.core.ranking import block_order
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.core.units import Statistics
from moe_fair.moe.calibration_text import CalibrationSet, evenly
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.criteria import criterion
from moe_fair.moe.statistics import alone, collecting
from moe_fair.pipelines.calibrate import choose_engine, collect
from moe_fair.pipelines.removal_losses import Removals, Sets

CURVE_COSTS = "cost curves", "an --allocate that needs no measured costs (uniform, global, tod)"
ALONE_COSTS = "removals of single experts", "a criterion that needs none (counterfactual)"
MEASURED = tuple(alone.names)  # names in the statistics


def check_costs(recipe: Recipe, source: Checkpoint, what: tuple[str, str]) -> None:
    """Costs can be measured here.

    Args:
        what: CURVE_COSTS or ALONE_COSTS: what is measured, and what does without.

    Raises:
        ValueError: the model would be streamed; says why and what to do.
    """
    chosen = choose_engine(recipe, source)
    if chosen.engine == "streaming":
        measured, instead = what
        raise ValueError(
            f"{measured} run the whole model in memory, and the engine is streaming ({chosen.why})"
            f"; use --engine resident (with --max-memory where there is room), or {instead}"
        )


def measure_curves(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    statistics: Statistics,
    removal: str,
    work: Path | None = None,
    say: Say = lambda _: None,
) -> Statistics:
    """The statistics with the cost curves of one removal score.

    Args:
        text: the calibration set, of which `recipe.curve_samples` sequences are measured.
        removal: the criterion by which experts leave.
        work: where each layer's measurements are kept until the result is safe; a run that was
            killed goes on at the next layer.
    """
    check_costs(recipe, source, CURVE_COSTS)
    body = statistics.without_following()
    scores = criterion(removal)(body, recipe.weights)
    wanted: Sets = {}
    for g in body.groups:
        order = block_order(scores.values[g.name].numpy(), g.blocks).tolist()
        wanted[g.name] = [order[:m] for m in depths_to_measure(g)]
    part = share(text, recipe.curve_samples)
    removals = _measured(recipe, source, part, wanted, work, f"cost curves of {removal}", say)
    return attach(
        statistics, removals.changes, removal, recipe.weights,
        sequences=len(part.sequences), tokens=part.tokens,
    )  # fmt: skip


def measure_alone(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    statistics: Statistics,
    work: Path | None = None,
    say: Say = lambda _: None,
) -> Statistics:
    """The statistics with the measured loss change of every expert removed alone.

    Added are, per calibration domain and expert and summed over the tokens of the share,
    `alone_change`, the change of the loss in nats, and on the same tokens `alone_first`, Σ δ, and
    `alone_fisher`, Σ ½ δ² (see `moe.criteria.counterfactual`); `alone_tokens` counts them.

    Args:
        text: the calibration set, of which `recipe.curve_samples` sequences are measured.
        work: where each layer's measurements are kept until the result is safe; a run that was
            killed goes on at the next layer.
    """
    check_costs(recipe, source, ALONE_COSTS)
    part = share(text, recipe.curve_samples)
    groups = statistics.without_following().groups
    wanted = {g.name: [[e] for e in range(g.size)] for g in groups}
    layers = work / "layers" if work else None
    removals = _measured(recipe, source, part, wanted, layers, "each expert's removal alone", say)
    only = recipe.with_settings({"mtp": "drop"})
    wanted_sums = collecting(["removed_first", "removed_gram"])
    near = collect(only, source, part, work=work, collected=wanted_sums)
    assert near is not None  # the other processes take no part
    sums = {
        g.name: {
            **statistics.sums[g.name],
            "alone_change": removals.by_domain(g.name),
            "alone_first": near.sums[g.name]["removed_first"],
            "alone_fisher": 0.5 * near.sums[g.name]["removed_gram"].diagonal(dim1=1, dim2=2),
            "alone_tokens": near.tokens.unsqueeze(1).expand(-1, g.size).contiguous(),
        }
        for g in groups
    }
    facts = {"sequences": len(part.sequences), "tokens": part.tokens}
    return replace(
        statistics,
        sums={**statistics.sums, **sums},
        metadata={**statistics.metadata, "alone": facts},
    )


def holds_alone(statistics: Statistics) -> bool:
    """The statistics hold what `measure_alone` adds."""
    groups = statistics.without_following().groups
    return all(n in statistics.sums.get(g.name, {}) for g in groups for n in MEASURED)


def _measured(
    recipe: Recipe,
    source: Checkpoint,
    part: CalibrationSet,
    wanted: Sets,
    work: Path | None,
    what: str,
    say: Say,
) -> Removals:
    """The loss changes of the wanted removals, those that a killed run has left included."""
    removals = Removals(recipe, source, part, wanted, work)
    before = f"; {removals.earlier} layers were done before" if removals.earlier else ""
    say(f"measuring {what} on {len(part.sequences)} sequences, {part.tokens:,} tokens{before}")
    removals.measure("measuring costs", say)
    return removals


def share(text: CalibrationSet, count: int) -> CalibrationSet:
    """Evenly spaced sequences of the set, every domain in its proportion."""
    if count >= len(text.sequences):
        return text
    return replace(text, sequences=tuple(text.sequences[i] for i in evenly(text, count)))
