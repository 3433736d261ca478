"""The original model's own words as more text for a repair.

    x'_{t+1} ~ p(· | x_1 … x_t)   with probability SHARE,   else x_{t+1}

A repair makes pruned layers do what the original's layers do. Whatever the text, the original says
what that is, so the text need not have been written by anybody: it has to be wide, and near what
the model is used on. Sampling every token from the model's prediction after the REAL text before it
takes one forward, whole or layer by layer, where text continued word by word takes one a token.

Sampled is the token whose share of [0, 1) holds a seeded random number, so that a device's rounding
of p hardly ever matters.

Shape legend: B sequences, L tokens, V vocabulary, P positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from moe_fair.engines.batch import Batch, Engine

SHARE = 0.7  # of the tokens, drawn anew
TOKENS = 2**18  # of text and copies together: more text has less need of copies
MOST = 3  # copies: more of them cost time and gain little
ROWS = 2**24  # elements of one chunk of positions in float64


def copies_for(tokens: int) -> int:
    """How many copies a text of so many tokens is given."""
    return min(MOST, max(0, TOKENS // max(1, tokens) - 1))


def resampled_text(
    engine: Engine,
    batches: Sequence[Batch],
    copies: int,
    *,
    seed: int,
    forbidden: Collection[int] = (),
    most: int | None = None,
) -> list[Batch]:
    """Copies of the batches in which the model has drawn most tokens anew.

    Args:
        engine: over the original model.
        forbidden: ids that are never drawn: what a tokenizer's special tokens start or end.
        most: sequences whose logits are in memory at a time; None: as many as a batch has.

    Returns:
        all first copies, then all second ones, ...; ids of the sequences stay.
    """
    if not copies:
        return []
    draw = torch.Generator().manual_seed(seed)
    parts = [b.parts(most) for b in batches]
    logits = engine.logits([p for ps in parts for p in ps])
    drawn = []
    for batch, its in zip(batches, parts, strict=True):
        rest = batch.input_ids.shape[1] - 1
        dice = torch.rand(copies, len(batch.mask), rest, 2, generator=draw, dtype=torch.float64)
        rows = dice.split([len(p.mask) for p in its], 1)
        made = [
            _draw(p, d, x, forbidden)
            for p, d, x in zip(its, rows, islice(logits, len(its)), strict=True)
        ]
        drawn.append([torch.cat(copy) for copy in zip(*made, strict=True)])
    return [
        replace(batch, input_ids=ids[copy])
        for copy in range(copies)
        for batch, ids in zip(batches, drawn, strict=True)
    ]


def _draw(batch: Batch, dice: Tensor, logits: Tensor, forbidden: Collection[int]) -> list[Tensor]:
    """[B, L] ids of each copy, from logits [B, L, V] and dice [copies, B, L - 1, 2]."""
    b, length, v = logits.shape
    copies = len(dice)
    tokens = torch.empty(copies, b, length - 1, dtype=torch.int64)
    never = torch.tensor([i for i in sorted(forbidden) if i < v], dtype=torch.int64)
    never = never.to(logits.device)
    step = max(1, ROWS // v)
    for row in range(b):
        for start in range(0, length - 1, step):
            upto = slice(start, min(start + step, length - 1))
            part = logits[row, upto].double()
            part[:, never] = -torch.inf
            part = part.softmax(-1).cumsum(-1)
            wanted = dice[:, row, upto, 0].T.to(part.device) * part[:, -1:]
            found = torch.searchsorted(part, wanted.contiguous(), right=True)
            tokens[:, row, upto] = found.T.clamp(max=v - 1).cpu()
    made = []
    for copy in range(copies):
        take = dice[copy, ..., 1] < SHARE
        take &= batch.mask[:, 1:].bool().cpu()
        ids = batch.input_ids.cpu().clone()
        ids[:, 1:] = torch.where(take, tokens[copy], ids[:, 1:])
        made.append(ids.to(batch.input_ids.device))
    return made
