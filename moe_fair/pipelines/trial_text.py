"""The text that plans are tried on: what judges them, and what teaches their fits before that."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.moe.calibration_text import CalibrationSet, evenly, split
from moe_fair.moe.repairs import refit, repair
from moe_fair.pipelines.rivals import rivals

LEAST = 16  # sequences: fewer tell plans apart by luck
SHARE = 4  # of the calibration text one part in so many, at most
TEACHING = 2**14  # tokens that teach the fits, where that is more than what judges


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


def sequence_weights(recipe: Recipe, text: CalibrationSet) -> Tensor:
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
