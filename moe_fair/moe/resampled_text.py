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
) -> list[Batch]:
    """Copies of the batches in which the model has drawn most tokens anew.

    Args:
        engine: over the original model.
        forbidden: ids that are never drawn: what a tokenizer's special tokens start or end.

    Returns:
        all first copies, then all second ones, ...; ids of the sequences stay.
    """
    if not copies:
        return []
    draw = torch.Generator().manual_seed(seed)
    drawn = [
        _draw(batch, logits[:, :-1], copies, draw, forbidden)
        for batch, logits in zip(batches, engine.logits(batches), strict=True)
    ]
    return [
        replace(batch, input_ids=ids[copy])
        for copy in range(copies)
        for batch, ids in zip(batches, drawn, strict=True)
    ]


def _draw(
    batch: Batch, logits: Tensor, copies: int, draw: torch.Generator, forbidden: Collection[int]
) -> list[Tensor]:
    """[B, L] ids of each copy, from logits [B, L - 1, V]."""
    b, rest, v = logits.shape
    flat = logits.reshape(-1, v)
    dice = torch.rand(copies, len(flat), 2, generator=draw, dtype=torch.float64)
    tokens = torch.empty(copies, len(flat), dtype=torch.int64)
    never = torch.tensor([i for i in sorted(forbidden) if i < v], dtype=torch.int64)
    step = max(1, ROWS // v)
    for start in range(0, len(flat), step):
        part = flat[start : start + step].double()
        part[:, never.to(part.device)] = -torch.inf
        upto = part.softmax(-1).cumsum(-1)
        wanted = dice[:, start : start + step, 0].T.to(part.device) * upto[:, -1:]
        found = torch.searchsorted(upto, wanted.contiguous(), right=True)
        tokens[:, start : start + step] = found.T.clamp(max=v - 1).cpu()
    made = []
    for copy in range(copies):
        take = (dice[copy, :, 1] < SHARE).view(b, rest)
        take &= batch.mask[:, 1:].bool().cpu()
        ids = batch.input_ids.cpu().clone()
        ids[:, 1:] = torch.where(take, tokens[copy].view(b, rest), ids[:, 1:])
        made.append(ids.to(batch.input_ids.device))
    return made
