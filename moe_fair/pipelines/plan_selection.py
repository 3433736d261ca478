"""Trying plans before one is taken: the method's own and its rivals', on text that no score saw.

A score is an estimate, and which estimate is best depends on the model: where experts are balanced
and alike, those with gradients follow the calibration text too closely (eval/LAB.md). So the loss
without each plan's experts is measured on calibration sequences that were held back from the
statistics. A rival's plan is taken where it is clearly better: by a tenth, and by more than one
standard error of the difference, paired by sequences. Plans that are about as good before a repair
need not be after it, and there the method's own were the better ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fair.core.allocate import allocator, needs
from moe_fair.core.output import digest, write_whole
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import TARGETS, Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.progress import Progress
from moe_fair.engines.streaming import NotLayerwise, StreamingEngine
from moe_fair.moe.calibration_text import CalibrationSet, split
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.trial import trial_losses
from moe_fair.pipelines.calibrate import Say, choose_engine
from moe_fair.pipelines.checks import check_plan_settings
from moe_fair.pipelines.collection import check_needs
from moe_fair.pipelines.methods import method, method_name
from moe_fair.pipelines.oom_retry import NothingSmaller, layerwise_until_it_fits
from moe_fair.pipelines.rivals import RIVALS as RIVALS
from moe_fair.pipelines.rivals import rivals as rivals

LEAST = 8  # sequences: fewer tell plans apart by luck
MARGIN = 0.1  # of the own change, by which a rival's must be smaller
SHARE = 8  # of the calibration text one part in so many, at most


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
    """Every rival that was named is a method that can meet the target, where there is one.

    Raises:
        ValueError: one is not; says which.
    """
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


def held_back(recipe: Recipe, text: CalibrationSet) -> int:
    """How many of the sequences are held back from the statistics; 0 where nothing is tried."""
    return _count(text, recipe.trial_samples) if rivals(recipe) else 0


def _count(text: CalibrationSet, most: int) -> int:
    count = min(most, len(text.sequences) // SHARE)
    return count if count >= LEAST else 0


def split_holdout(
    recipe: Recipe, text: CalibrationSet, say: Say = lambda _: None
) -> tuple[CalibrationSet, CalibrationSet | None]:
    """What statistics are gathered on, and what plans are tried on."""
    return hold_out(text, recipe.trial_samples, say) if rivals(recipe) else (text, None)


def hold_out(
    text: CalibrationSet, most: int, say: Say = lambda _: None
) -> tuple[CalibrationSet, CalibrationSet | None]:
    """The same where plans are tried.

    Args:
        most: sequences that are held back.
    """
    count = _count(text, most)
    if not count:
        say(
            f"note: no plan is tried against another's: {len(text.sequences)} samples are "
            f"fewer than {LEAST * SHARE}"
        )
        return text, None
    say(f"held back to try plans on: {count} of {len(text.sequences)} sequences")
    return split(text, count)


def best_plan(
    make: Callable[[Statistics, Recipe], Plan],
    recipe: Recipe,
    source: Checkpoint,
    statistics: Statistics,
    text: CalibrationSet,
    home: Path,
    say: Say = lambda _: None,
) -> Plan:
    """The method's own plan, or a rival's that loses less on a text.

    Args:
        make: statistics and recipe -> plan.
        text: what the statistics have not seen.
        home: see `try_plans`.

    Raises:
        ValueError: a rival that was named makes no plan here, or layers do not run one at a time.
    """
    name = recipe.planning().get("method") or method_name(recipe)
    made = [Tried(name, make(statistics, recipe))]
    for name, its in rivals(recipe).items():
        try:
            made.append(Tried(name, make(statistics, its)))
        except ValueError as e:
            if recipe.rivals is not None:
                raise ValueError(f"--rivals {name}: {e}") from e
            say(f"note: {name} is not tried: {e}")
    try:
        return try_plans(recipe, source, text, made, home, say)
    except NotLayerwise as e:
        if recipe.rivals is not None:
            raise
        say(f"note: no plan is tried: {e}")
        return made[0].plan


def try_plans(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Tried],
    home: Path,
    say: Say = lambda _: None,
) -> Plan:
    """The best of some plans by the loss on a text.

    Args:
        plans: the method's own first.
        home: file for the measured losses; a run that was killed finds them there.

    Returns:
        the plan, with what was measured in its `explanation` and its notes.
    """
    different = _different(plans)
    if len(different) < 2:
        return plans[0].plan
    weights = _sequence_weights(recipe, text)
    seen = weights > 0  # what --weights leaves out tells nothing, of the spread neither
    if int(seen.sum()) < 2:
        say("note: no plan is tried: the held-back text is of domains whose weight is 0")
        return plans[0].plan
    try:
        losses, counts = _losses(recipe, source, text, different, home, say)
    except NothingSmaller as e:  # the statistics are there: what was made of them is a plan as well
        note = f"no plan was tried against another's: out of memory ({e})"
        say(f"note: {note}")
        return replace(plans[0].plan, notes=[*plans[0].plan.notes, note])
    losses, counts, weights = (losses * weights)[:, seen], counts[seen], weights[seen]
    tokens = float(counts @ weights)
    tried = [
        replace(t, change=_change(losses[p], losses[0], tokens),
                stderr=_stderr(losses[p] - losses[1], tokens))
        for p, t in enumerate(different, 1)
    ]  # fmt: skip
    best = best_of(tried)
    about = {
        "sequences": len(counts), "tokens": int(counts.sum()), "taken": best.name,
        "loss": float(losses[0].sum()) / tokens,
        "changes": {t.name: t.change for t in tried}, "stderr": {t.name: t.stderr for t in tried},
    }  # fmt: skip
    shown = ", ".join(f"{t.name} {t.change:+.4f}" for t in sorted(tried, key=lambda t: t.change))
    note = (
        f"tried on {len(counts)} held-back sequences, before any repair: {shown}; "
        f"{best.name} was taken"
    )
    explanation = {**best.plan.explanation, "trials": about}
    return replace(best.plan, explanation=explanation, notes=[*best.plan.notes, note])


def best_of(tried: Sequence[Tried]) -> Tried:
    """The first, or the best of those that are clearly better."""
    own = tried[0]
    margin = MARGIN * abs(own.change)
    better = [t for t in tried[1:] if t.change < own.change - max(margin, t.stderr)]
    return min([own, *better], key=lambda t: t.change)


def _different(plans: Sequence[Tried]) -> list[Tried]:
    """Without those that keep what an earlier one keeps."""
    found: list[Tried] = []
    for t in plans:
        if all(t.plan.kept != other.plan.kept for other in found):
            found.append(t)
    return found


def _losses(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Tried],
    home: Path,
    say: Say,
) -> tuple[Tensor, Tensor]:
    """[1 + P, N] summed losses of every sequence, and [N] its predictions."""
    key = _key(recipe, source, text, plans)
    found = _earlier(home, key)
    if found is not None:
        return found
    chosen = choose_engine(recipe, source)
    say(f"trying {len(plans)} plans on {text.tokens:,} tokens, engine: {chosen.engine}")
    layers = source.config.get_text_config().num_hidden_layers
    removed = [
        {g.name: sorted(set(range(g.size)) - set(g.kept)) for g in t.plan.groups} for t in plans
    ]

    def trial(most: int | None) -> Callable[[StreamingEngine], tuple[Tensor, Tensor]]:
        parts = [p for b in text.batches(recipe.batch_size) for p in b.parts(most)]
        return lambda engine: trial_losses(engine, parts, removed)

    fewer = [n for n in (recipe.batch_size // 4, 1) if 0 < n < recipe.batch_size]
    attempts = [("", trial(None)), *((f"with {n} sequences at a time", trial(n)) for n in fewer)]
    with Progress("trying", text.tokens * layers) as progress:
        losses, counts = layerwise_until_it_fits(
            source, chosen.engine, recipe.dtype, recipe.device, progress, attempts, say
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError(
            "the loss on held-back calibration text is NaN or Inf; look for a bad weight, or use "
            "--dtype float32 where a type overflows"
        )
    measured = {"key": key, "losses": losses.tolist(), "counts": counts.tolist()}
    write_whole(home, json.dumps(measured))
    return losses, counts


def _sequence_weights(recipe: Recipe, text: CalibrationSet) -> Tensor:
    """[N] the weight of each sequence's domain, in the order of the batches."""
    weights = recipe.weights or {}
    return torch.tensor(
        [
            weights.get(text.domains[b.domain], 1.0)
            for b in text.batches(recipe.batch_size)
            for _ in b.sequence_ids
        ],
        dtype=torch.float64,
    )


def _key(recipe: Recipe, source: Checkpoint, text: CalibrationSet, plans: Sequence[Tried]) -> str:
    """What the losses depend on."""
    key: dict[str, Any] = {
        "model": source.fingerprint, "text": text.digest, "batch": recipe.batch_size,
        "dtype": recipe.dtype, "device": recipe.device, "kept": [t.plan.kept for t in plans],
    }  # fmt: skip
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


def _change(losses: Tensor, base: Tensor, tokens: float) -> float:
    return float((losses - base).sum()) / tokens


def _stderr(difference: Tensor, tokens: float) -> float:
    """Standard error of the mean difference a token, from its spread over the sequences."""
    n = len(difference)
    spread = float((difference - difference.mean()).square().sum())
    return math.sqrt(n / (n - 1) * spread) / tokens
