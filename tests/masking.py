"""The model's own router with some experts' logits at minus infinity: pruning without cutting.

Where a table of token ids says who serves which token, what it shall say is recomputed token by
token in plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_fair.moe.blocks import MoeBlock, find_blocks


@contextmanager
def masked(model: Any, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, every router sees -inf for the experts that are not kept.

    The router's own code runs; only what its linear map gives, and its correction bias, are masked.
    Of a router that chooses by a table only the table is another one.
    """
    with ExitStack() as stack:
        for name in kept:
            gate = getattr(model.get_submodule(name), "gate", None)
            if hasattr(gate, "tid2eid"):
                stack.enter_context(_other_table(gate, kept[name]))
        for block in find_blocks(model):
            if block.name in kept and not hasattr(block.router, "tid2eid"):
                stack.enter_context(_masked_block(block, kept[block.name]))
        yield


@contextmanager
def _other_table(gate: Any, kept: Sequence[int]) -> Iterator[None]:
    table = gate.tid2eid.clone()
    gate.tid2eid.copy_(torch.tensor(substitutes(table.tolist(), kept, gate.weight.tolist())))
    try:
        yield
    finally:
        gate.tid2eid.copy_(table)


def substitutes(
    table: Sequence[Sequence[int]], kept: Sequence[int], rows: Sequence[Sequence[float]]
) -> list[list[int]]:
    """Every token's experts without those that are not kept, in their old numbers.

    Args:
        rows: the router's, one an expert.
    """
    length = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]

    @cache
    def cosine(a: int, b: int) -> float:
        dot = math.fsum(x * y for x, y in zip(rows[a], rows[b], strict=True))
        return round(dot / (length[a] * length[b]), 12)

    found = []
    for row in table:
        new = list(row)
        for i, e in enumerate(row):
            if e not in kept:
                free = [k for k in kept if k not in new]
                new[i] = min(free, key=lambda k: (-cosine(e, k), k))
        found.append(new)
    return found


@contextmanager
def _masked_block(block: MoeBlock, kept: Sequence[int]) -> Iterator[None]:
    size = block.num_experts
    gone = torch.ones(size, dtype=torch.bool)
    gone[list(kept)] = False
    linear, stock = F.linear, block.router.forward

    def hide(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = linear(x, w, b)
        return y.masked_fill(gone, float("-inf")) if y.shape[-1] == size else y

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.nn.functional, "linear", hide):
            return stock(*args, **kwargs)

    # sigmoid(-inf) = 0, so a correction bias alone would choose
    biases = [getattr(m, t) for m, t, _ in block.routed if "bias" in t]
    saved = [b.detach().clone() for b in biases]
    block.router.forward = forward
    with torch.no_grad():
        for b in biases:
            b.view(-1)[gone] = float("-inf")
    try:
        yield
    finally:
        del block.router.forward
        with torch.no_grad():
            for b, s in zip(biases, saved, strict=True):
                b.copy_(s)
