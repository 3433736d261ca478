"""What plans lose on a text, kept in a file, so that a run which was killed does not ask again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fair.core.output import digest, write_whole
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.engines.progress import Progress
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.repaired_trial import repaired_losses
from moe_fair.moe.trial import trial_losses
from moe_fair.pipelines.calibrate import choose_engine, loading
from moe_fair.pipelines.oom_retry import layerwise_until_it_fits


def losses_of(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Plan],
    home: Path,
    say: Say,
    teaching: CalibrationSet | None = None,
) -> tuple[Tensor, Tensor]:
    """[1 + P, N] summed losses of every sequence, and [N] its predictions."""
    key = _key(recipe, source, text, plans, teaching)
    found = _earlier(home, key)
    if found is not None:
        return found
    chosen = choose_engine(recipe, source)
    taught = teaching.tokens if teaching is not None else 0
    also = f", repaired on {taught:,}" if taught else ""
    say(f"trying {len(plans)} plans on {text.tokens:,} tokens{also}, engine: {chosen.engine}")
    layers = source.config.get_text_config().num_hidden_layers
    removed = [
        {g.name: sorted(set(range(g.size)) - set(g.kept)) for g in plan.groups} for plan in plans
    ]

    def trial(most: int | None) -> Callable[[StreamingEngine], tuple[Tensor, Tensor]]:
        parts, taught = (
            [p for b in t.batches(recipe.batch_size) for p in b.parts(most)] if t else []
            for t in (text, teaching)
        )
        if teaching is None:
            return lambda engine: trial_losses(engine, parts, removed)
        keep = most is None
        return lambda engine: repaired_losses(engine, taught, parts, removed, keep=keep)

    fewer = [n for n in (recipe.batch_size // 4, 1) if 0 < n < recipe.batch_size]
    attempts = [("", trial(None)), *((f"with {n} sequences at a time", trial(n)) for n in fewer)]
    with Progress("trying", (text.tokens + taught) * layers) as progress:
        losses, counts = layerwise_until_it_fits(
            source, chosen.engine, loading(recipe), progress, attempts, say
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError(
            "the loss on held-back calibration text is NaN or Inf; look for a bad weight, or use "
            "--dtype float32 where a type overflows"
        )
    measured = {"key": key, "losses": losses.tolist(), "counts": counts.tolist()}
    write_whole(home, json.dumps(measured))
    return losses, counts


def _key(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Plan],
    teaching: CalibrationSet | None,
) -> str:
    """What the losses depend on."""
    key: dict[str, Any] = {
        "model": source.fingerprint, "text": text.digest, "batch": recipe.batch_size,
        "dtype": recipe.dtype, "device": recipe.device, "kept": [p.kept for p in plans],
    }  # fmt: skip
    if teaching is not None:
        key["teaching"] = teaching.digest
    return digest(key)


def _earlier(home: Path, key: str) -> tuple[Tensor, Tensor] | None:
    """What a killed run measured."""
    try:
        found = json.loads(home.read_text())
        if found["key"] != key:
            return None
        losses, counts = (
            torch.tensor(found[name], dtype=torch.float64) for name in ("losses", "counts")
        )
        return losses, counts
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: measured again
