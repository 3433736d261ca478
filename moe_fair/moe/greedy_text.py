"""How a model goes on with given beginnings where it always takes its first choice.

A model whose loss is lower may still write worse. Asked are

    agreement  = share of the original's own continuations that the model ranks first, behind the
                 true beginning and the original's tokens before it
    repetition = share of the 4-grams of the model's own continuations that it has written before

Shape legend: B beginnings, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fair.engines.batch import Batch
from moe_fair.moe.healing_text import HealingText

PROMPTS = 64  # beginnings, over all domains
PROMPT, WRITTEN = 32, 32  # most tokens that are given, and tokens that are written
GRAM = 4
# (batch, n) -> [B, n] the tokens that a model ranks first behind each of the last n positions
Choices = Callable[[Batch, int], Tensor]


def beginnings(text: HealingText) -> Tensor:
    """[B, L] how evenly spaced judging sequences begin."""
    long = [i for i in text.judging if text.length(i) >= 2]
    some = [long[k * len(long) // PROMPTS] for k in range(PROMPTS)] if long[PROMPTS:] else long
    length = min(PROMPT, *(text.length(i) for i in (some + some)))
    return torch.tensor([text.text.sequences[i][0][:length] for i in some])


def continuations(choices: Choices, prompts: Tensor, most: int) -> Tensor:
    """[B, WRITTEN] tokens that a model's first choices add to [B, L] prompts, `most` at a time."""
    parts = []
    for rows in prompts.split(most):
        for _ in range(WRITTEN):
            rows = torch.cat([rows, choices(_batch(rows), 1)], 1)
        parts.append(rows[:, -WRITTEN:])
    return torch.cat(parts)


def agreement(choices: Choices, prompts: Tensor, written: Tensor, most: int) -> Tensor:
    """[B] share of what the original has written that the model ranks first."""
    parts = []
    for rows, wanted in zip(prompts.split(most), written.split(most), strict=True):
        given = torch.cat([rows, wanted[:, :-1]], 1)
        parts.append((choices(_batch(given), WRITTEN) == wanted).double().mean(1))
    return torch.cat(parts)


def repetition(written: Tensor) -> Tensor:
    """[B] share of each text's 4-grams that stood in it before."""
    found = []
    for row in written.tolist():
        grams = [tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)]
        found.append(1 - len(set(grams)) / len(grams))
    return torch.tensor(found, dtype=torch.float64)


def worse_by_chance(change: Tensor) -> float:
    """What the mean of [B] changes may be by chance alone: two standard errors."""
    return 2 * float(change.std()) / max(1, len(change)) ** 0.5 if len(change) > 1 else 0.0


def _batch(rows: Tensor) -> Batch:
    return Batch(rows, torch.ones_like(rows), torch.arange(len(rows)), 0)
