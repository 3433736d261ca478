"""Measuring what each layer's depth costs: loss changes on a share of the calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_fair.collecting import Say, choose_engine
from moe_fair.core.cost_curves import attach, depths_to_measure
from moe_fair.core.ranking import block_order
from moe_fair.core.units import Statistics
from moe_fair.measuring import Removals, Sets
from moe_fair.moe.calibration import CalibrationSet, evenly
from moe_fair.moe.criteria import criterion
from moe_fair.moe.load import Checkpoint
from moe_fair.recipe import Recipe


def check_curves(recipe: Recipe, source: Checkpoint) -> None:
    """Cost curves can be measured here.

    Raises:
        ValueError: the model would be streamed; says why and what to do.
    """
    chosen = choose_engine(recipe, source)
    if chosen.engine == "streaming":
        raise ValueError(
            f"cost curves run the whole model in memory, and the engine is streaming ({chosen.why})"
            "; use --engine resident (with --max-memory where there is room), or an --allocate "
            "that needs no measured costs (uniform, global, tod)"
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
    check_curves(recipe, source)
    scores = criterion(removal)(statistics, recipe.weights)
    wanted: Sets = {}
    for g in statistics.groups:
        order = block_order(scores.values[g.name].numpy(), g.blocks).tolist()
        wanted[g.name] = [order[:m] for m in depths_to_measure(g)]
    part = share(text, recipe.curve_samples)
    removals = Removals(recipe, source, part, wanted, work)
    about = f"cost curves of {removal} on {len(part.sequences)} sequences, {part.tokens:,} tokens"
    before = f"; {removals.earlier} layers were done before" if removals.earlier else ""
    say(f"measuring {about}{before}")
    removals.measure("measuring costs")
    return attach(
        statistics, removals.changes, removal, recipe.weights,
        sequences=len(part.sequences), tokens=part.tokens,
    )  # fmt: skip


def share(text: CalibrationSet, count: int) -> CalibrationSet:
    """Evenly spaced sequences of the set, every domain in its proportion."""
    if count >= len(text.sequences):
        return text
    return replace(text, sequences=tuple(text.sequences[i] for i in evenly(text, count)))
