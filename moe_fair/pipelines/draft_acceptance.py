"""Measuring what a model's heads for multi-token prediction are still good for."""

from __future__ import annotations

from torch import nn

from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.device import pick_device
from moe_fair.engines.progress import Progress
from moe_fair.evaluate.drafts import Drafts
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import Choice, weight_dtype
from moe_fair.moe.mtp_head import Drafting, HeadRunner
from moe_fair.pipelines.calibrate import choose_engine, loading, passes
from moe_fair.pipelines.oom_retry import RetryingEngine
from moe_fair.pipelines.removal_costs import share

SEQUENCES = 64  # of the held-out text


def measure_drafts(
    recipe: Recipe, source: Checkpoint, text: CalibrationSet, what: str, say: Say
) -> Drafts:
    """What becomes of the tokens that the heads draft on a share of a text.

    Args:
        source: a checkpoint whose heads can be run.
        what: for the progress bar.
    """
    part = share(text, SEQUENCES)
    if recipe.device_map:
        chosen = Choice("resident", f"spread by --device-map {recipe.device_map}")
    else:
        chosen = choose_engine(recipe, source)
    device = pick_device(recipe.device)
    dtype = weight_dtype(source, recipe.dtype, device)

    def drafting(model: nn.Module) -> Drafting:
        return Drafting(HeadRunner(source, model, dtype, device))

    with Progress(what, part.tokens * passes(chosen, source, False)) as progress:
        engine = RetryingEngine(loading(recipe), source, chosen, progress, say=say)
        done = engine.collect(part.batches(recipe.batch_size), drafting, backward=False)
    return Drafts(done.after.drafted, done.after.accepted)
