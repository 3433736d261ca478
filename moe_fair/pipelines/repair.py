"""Repairing a checkpoint's remaining experts on calibration text, whole in memory or streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_fair.core.output import digest
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.batch import Batch, Engine
from moe_fair.engines.layer_calls import NotLayerwise, check_layerwise
from moe_fair.engines.progress import Progress
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.conversion import Conversion
from moe_fair.moe.judging import teaching
from moe_fair.moe.layer_distillation import STEP_TOKENS
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.overlay import check_layouts
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer
from moe_fair.moe.repairs import check_repairable, repair
from moe_fair.moe.resampled_text import copies_for, resampled_text
from moe_fair.pipelines.calibrate import choose_engine, loading
from moe_fair.pipelines.oom_retry import NothingSmaller, layerwise_until_it_fits
from moe_fair.pipelines.removal_costs import share

DEFAULT = "distill"


def repair_kind(
    recipe: Recipe, source: Checkpoint, say: Say = lambda _: None, *, merges: bool = False
) -> str | None:
    """The repair that a recipe stands for on this model, or None.

    Args:
        merges: experts are merged; these are repaired where it is asked for.

    Raises:
        ValueError: the repair that was asked for does not exist, or cannot be done on this model.
    """
    wanted = recipe.parts["repair"]
    if wanted == "none" or (merges and wanted is None):
        return None
    rule = repair(wanted or DEFAULT)
    try:
        for block in source.blocks:
            check_repairable(rule, block.experts)
        check_layouts(source)
        check_layerwise(source.skeleton)
    except ValueError as e:
        if wanted is not None:
            raise
        say(f"note: not repaired: {e}")
        return None
    return rule.name


def repair_model(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plan: Plan,
    kind: str,
    folder: Path,
    say: Say = lambda _: None,
    conversion: Conversion | None = None,
    merged: Path | None = None,
) -> list[LayerRepair]:
    """Repaired tensors of every cut layer into `folder`; a killed run goes on at the next layer.

    A short text is given copies in the model's own words (see `moe.resampled_text`).

    Args:
        conversion: what the result's weights will be, where that is not what they are.
        merged: of a plan that merges experts, the folder of what they become.

    Returns:
        what was done to each layer.
    """
    kept, copies = plan.kept, copies_of(text, kind)
    repacking = None
    if source.packing is not None or conversion is not None:
        repacking = Repacking(source, kept, conversion)
    key = {
        "model": source.fingerprint, "text": text.digest, "kind": kind,
        "kept": {k: list(v) for k, v in kept.items()}, "copies": copies, "seed": recipe.seed,
        "batch": step_sequences(recipe), "dtype": recipe.dtype, "device": recipe.device,
    }  # fmt: skip
    if conversion is not None:
        key["save_as"] = conversion.target.name
    if plan.merges:
        key["merged"] = [plan.aligned, {g.name: g.merged for g in plan.groups}]
    folder.mkdir(parents=True, exist_ok=True)
    chosen = choose_engine(recipe, source)
    also = f" and {copies} copies in the model's own words" if copies else ""
    say(f"repairing ({kind}) on {text.tokens:,} tokens{also}, engine: {chosen.engine}")
    layers = source.config.get_text_config().num_hidden_layers
    passes = 2 + copies if copies else 1  # one of them draws the copies

    def attempt(sequences: int, sparing: bool) -> Callable[[StreamingEngine], list[LayerRepair]]:
        part = share(text, sequences)
        its = digest({**key, "text": part.digest})

        def run(engine: StreamingEngine) -> list[LayerRepair]:
            repairer = Repairer(
                engine,
                kept,
                kind,
                folder=folder,
                key=its,
                sparing=sparing,
                repacking=repacking,
                merged=merged if plan.merges else None,
                say=say,
            )
            most = 1 if sparing else None
            return repairer.run(_with_copies(recipe, source, part, copies, engine, most))

        return run

    count = len(text.sequences)
    attempts = [("", attempt(count, False))]
    attempts += [("with what is not in use in main memory", attempt(count, True))]
    attempts += [
        (f"on {n} of {count} sequences", attempt(n, True))
        for n in (count // p for p in (2, 4, 8)) if n
    ]  # fmt: skip
    with Progress("repairing", text.tokens * layers * passes) as progress:
        try:
            done = layerwise_until_it_fits(
                source, chosen.engine, loading(recipe), progress, attempts, say
            )
        # whatever was asked: the cut model is worth more than none
        except NotLayerwise as e:  # not found out by `repair_kind`; met before anything is changed
            say(f"note: not repaired: {e}")
            return []
        except NothingSmaller as e:
            say(f"note: not repaired: out of memory ({e})")
            return []
    for layer in done:
        if layer.repair == "none" and not layer.epoch:
            say(f"{layer.name}: {kind} did not help on the held-out share and was not applied")
    return done


def copies_of(text: CalibrationSet, kind: str) -> int:
    """Copies in the model's own words that a repair of this kind is given beside the text."""
    return copies_for(text.tokens) if getattr(repair(kind), "wants_text", False) else 0


def step_sequences(recipe: Recipe) -> int:
    """Sequences to a batch: one size of steps, whatever more the memory would allow."""
    return min(recipe.batch_size, max(1, STEP_TOKENS // recipe.length))


def repair_text(
    recipe: Recipe, source: Checkpoint, text: CalibrationSet, kind: str, engine: Engine
) -> list[Batch]:
    """The calibration text, and copies of it in the words of the engine's original model."""
    return _with_copies(recipe, source, text, copies_of(text, kind), engine)


def _with_copies(
    recipe: Recipe, source: Checkpoint, text: CalibrationSet, copies: int, engine: Engine,
    most: int | None = None,
) -> list[Batch]:  # fmt: skip
    """The same with so many copies, predictions asked for `most` sequences at a time."""
    batches = text.batches(step_sequences(recipe))
    if not copies:
        return batches
    tokenizer = source.tokenizer()
    # in the middle of a text they would start or end something
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    copied = resampled_text(engine, batches, copies, seed=recipe.seed, forbidden=special, most=most)
    return [*batches, *teaching(copied)]
