"""A table that says which experts serve which token, when some of the experts leave.

Some routers look the experts of a token up by its id (DeepSeek V4's hash layers) and only weigh
them by score. Without an expert its tokens go to the remaining one whose router row is nearest,
which scores them most alike.

Shape legend: V tokens of the vocabulary, K experts of each, E experts, D model, U rows that change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from moe_fair.moe.blocks import MoeBlock

DECIMALS = 12  # of cosines: what differs only by the order in which devices add must not decide


def substituted(table: Tensor, kept: Sequence[int], rows: Tensor) -> Tensor:
    """The table with every removed expert replaced, from the first entry of a row to the last.

    In its place comes the remaining expert that the row does not name yet whose router row has the
    largest cosine with its own, the lowest id of equals.

    Args:
        table: [V, K] ids.
        kept: ids that stay, rising; K of them at least.
        rows: [E, D] the router's weight.

    Returns:
        [V, K] of `kept`, in the table's data type; a row without repeated ids stays one.
    """
    stays = torch.zeros(len(rows), dtype=torch.bool, device=table.device)
    stays[list(kept)] = True
    wide = table.long()
    changed = (~stays[wide]).any(1).nonzero().flatten()
    part = wide[changed]  # [U, K]
    named = torch.zeros(len(part), len(rows), dtype=torch.bool, device=table.device)
    named.scatter_(1, part, True)
    # the others of a row name K - 1 at most: one of the nearest K is free
    order = _nearest(rows, kept)[:, : table.shape[1]].to(table.device)
    for k in range(table.shape[1]):
        old = part[:, k]
        near = order[old]
        free = (~named.gather(1, near)).int().argmax(1, keepdim=True)  # the first
        part[:, k] = torch.where(stays[old], old, near.gather(1, free)[:, 0])
        named.scatter_(1, part[:, k : k + 1], True)
    new = table.clone()
    new[changed] = part.to(table.dtype)
    return new


def remapped(table: Tensor, kept: Sequence[int], rows: Tensor) -> Tensor:
    """`substituted` in the numbers that the remaining experts have after the cut."""
    number = torch.full((len(rows),), -1, dtype=table.dtype, device=table.device)
    number[list(kept)] = torch.arange(len(kept), dtype=table.dtype, device=table.device)
    return number[substituted(table, kept, rows).long()]


def _nearest(rows: Tensor, kept: Sequence[int]) -> Tensor:
    """[E, kept] for every removed expert the ids that stay, nearest first; zeros for the others."""
    size = len(rows)
    gone = sorted(set(range(size)) - set(kept))
    wide = rows.detach().double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    ids = torch.tensor(list(kept), device=rows.device)
    cosines = (unit[gone] @ unit[ids].T).round(decimals=DECIMALS)
    order = torch.zeros(size, len(ids), dtype=torch.int64, device=rows.device)
    order[gone] = ids[cosines.argsort(dim=1, descending=True, stable=True)]
    return order


@contextmanager
def without(block: MoeBlock, gone: Sequence[int]) -> Iterator[None]:
    """Inside, the block's table names substitutes for these experts; nothing where it has none."""
    if block.table is None or not gone:
        yield
        return
    module, name, weight = block.table
    table = getattr(module, name)
    if table.is_meta:
        raise ValueError(
            f"{block.name}: the router's table is offloaded, and routing without an expert cannot "
            "be found there; give the router a device, or use --engine streaming"
        )
    kept = sorted(set(range(block.num_experts)) - set(gone))
    with align_module_device(module):  # accelerate may have offloaded the weight
        new = substituted(table, kept, getattr(module, weight))
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, table)
