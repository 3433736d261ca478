"""Trying plans before one is taken: the method's own and its rivals', on text that no score saw.

A score is an estimate, and which estimate is best depends on the model: where experts are balanced
and alike, those with gradients follow the calibration text too closely (eval/LAB.md). So the loss
without each plan's experts is measured on calibration sequences that were held back from the
statistics. A rival's plan is taken where it is clearly better: by a tenth, and by more than one
standard error of the difference, paired by sequences.

What counts is what stays after the repair. Where the result is fitted, so is each plan before it is
judged (`moe.repaired_trial`), in two rounds: all of them with a third of the text that teaches
and half of what judges, then the better half of them with all of it.
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
from moe_fair.moe.calibration_text import CalibrationSet, evenly, split
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.repaired_trial import repaired_losses
from moe_fair.moe.repairs import refit, repair
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
TEACHING = 2**14  # tokens that teach the fits, where that is more than what judges
FIRST = 3  # one part in so many of them teaches in the first round
FEW = 3  # plans, of which there is no first round


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


def teaching_text(
    text: CalibrationSet, trial: CalibrationSet | None, kind: str | None
) -> CalibrationSet | None:
    """What plans are repaired on before they are judged; None where they are not.

    Args:
        text: all of it, `trial` included.
        kind: the result's repair.
    """
    if trial is None or kind is None or getattr(repair(kind), "path", None) is not refit.path:
        return None
    rest, _ = split(text, len(trial.sequences))
    each = max(1, rest.tokens // len(rest.sequences))
    return share_of(rest, max(len(trial.sequences), TEACHING // each))


def share_of(text: CalibrationSet, count: int) -> CalibrationSet:
    """Evenly spaced sequences of the text, every domain in its proportion."""
    count = min(count, len(text.sequences))
    return replace(text, sequences=tuple(text.sequences[i] for i in evenly(text, count)))


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
        return try_plans(recipe, source, text, made, home, say, teaching=teaching)
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
    if int((_sequence_weights(recipe, text) > 0).sum()) < 2:
        say("note: no plan is tried: the held-back text is of domains whose weight is 0")
        return plans[0].plan
    trial = _Trial(recipe, source, home, say)
    found = None
    if teaching is not None:
        try:
            found = trial.repaired(text, teaching, different)
        except (NotLayerwise, NothingSmaller) as e:
            say(f"note: plans are tried before any repair: {e}")
    try:
        tried, about = found or trial.round(text, different)
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


@dataclass(frozen=True)
class _Trial:
    """Trials of one model's plans; `home` is where what was measured is kept."""

    recipe: Recipe
    source: Checkpoint
    home: Path
    say: Say

    def repaired(
        self, text: CalibrationSet, teaching: CalibrationSet, plans: Sequence[Tried]
    ) -> tuple[list[Tried], dict[str, Any]]:
        """Each plan's change after a repair, the worse half of them on little text alone."""
        *early, last = rounds(text, teaching, len(plans))
        first = None
        for judges, few in early:
            if int((_sequence_weights(self.recipe, judges) > 0).sum()) > 1:
                tried, first = self.round(judges, plans, few, "-first")
                plans = better_half(tried)
        tried, about = self.round(last[0], plans, last[1])
        return tried, about if first is None else {**about, "first": first}

    def round(
        self,
        text: CalibrationSet,
        plans: Sequence[Tried],
        teaching: CalibrationSet | None = None,
        part: str = "",
    ) -> tuple[list[Tried], dict[str, Any]]:
        """Each plan with its change, and what a plan's explanation says of it."""
        weights = _sequence_weights(self.recipe, text)
        seen = weights > 0  # what --weights leaves out tells nothing, of the spread neither
        home = self.home.with_name(self.home.stem + part + self.home.suffix)
        losses, counts = _losses(self.recipe, self.source, text, plans, home, self.say, teaching)
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


def rounds(
    text: CalibrationSet, teaching: CalibrationSet, plans: int
) -> list[tuple[CalibrationSet, CalibrationSet]]:
    """What judges so many plans and what teaches their fits, of each round."""
    last = (text, teaching)
    if plans <= FEW:
        return [last]
    few = share_of(teaching, max(1, len(teaching.sequences) // FIRST))
    return [(share_of(text, len(text.sequences) // 2), few), last]


def better_half(tried: Sequence[Tried]) -> list[Tried]:
    """The first, and as many of the others as half of all are, in the order that they came in."""
    others = sorted(tried[1:], key=lambda t: t.change)[: half(len(tried)) - 1]
    return [t for t in tried if t is tried[0] or t in others]


def half(plans: int) -> int:
    """How many of so many plans are in the last round."""
    return (plans + 1) // 2


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
        {g.name: sorted(set(range(g.size)) - set(g.kept)) for g in t.plan.groups} for t in plans
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


def _key(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    plans: Sequence[Tried],
    teaching: CalibrationSet | None,
) -> str:
    """What the losses depend on."""
    key: dict[str, Any] = {
        "model": source.fingerprint, "text": text.digest, "batch": recipe.batch_size,
        "dtype": recipe.dtype, "device": recipe.device, "kept": [t.plan.kept for t in plans],
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


def _change(losses: Tensor, base: Tensor, tokens: float) -> float:
    return float((losses - base).sum()) / tokens


def _stderr(difference: Tensor, tokens: float) -> float:
    """Standard error of the mean difference a token, from its spread over the sequences."""
    n = len(difference)
    spread = float((difference - difference.mean()).square().sum())
    return math.sqrt(n / (n - 1) * spread) / tokens
