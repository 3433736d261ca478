"""Sums over the rows of each expert, in float64 and in an order that is always the same.

On a CPU one expert after another. On other devices in a fixed number of launches and without a
wait for the device: `bincount` waits there, and adds weights in whatever order threads arrive.

Shape legend: S (token, slot) rows, K slots of a token, E experts, D model, V kinds of values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_fair.engines.packing.experts import as_plain

CELLS = 2**24  # elements of one piece
WEIGHTS = 2**28  # of one piece on a device
WIDENED = 2**22  # weights of one piece on a CPU, which are made wider
ROWS = 1024  # whose vectors are added in float32 on a device


def sums(values: Tensor, ids: Tensor, size: int) -> Tensor:
    """[V, E] sums of values [V, S] over the rows of each expert.

    Args:
        ids: [T, K] the experts of S = T·K rows, none of them twice for a token.
    """
    if values.device.type == "cpu":
        flat = ids.flatten()
        return torch.stack([torch.bincount(flat, weights=v, minlength=size) for v in values])
    return dense_sums(values, ids, size)


def dense_sums(values: Tensor, ids: Tensor, size: int) -> Tensor:
    """`sums` by way of cells."""
    return _cells(values, ids, size).sum(1)


def sequence_sums(values: Tensor, ids: Tensor, size: int, length: int) -> Tensor:
    """[B, E] sums of values [S] over the rows of each sequence of `length` tokens and expert.

    Args:
        ids: as for `sums`.
    """
    if values.device.type != "cpu":
        return dense_sequence_sums(values, ids, size, length)
    tokens, k = ids.shape
    sequence = torch.arange(tokens).repeat_interleave(k).div(length, rounding_mode="floor")
    cell = sequence * size + ids.flatten()
    count = tokens // length
    return torch.bincount(cell, weights=values, minlength=count * size).view(count, size)


def dense_sequence_sums(values: Tensor, ids: Tensor, size: int, length: int) -> Tensor:
    """`sequence_sums` by way of cells."""
    return _cells(values[None], ids, size).view(-1, length, size).sum(1)


def _cells(values: Tensor, ids: Tensor, size: int) -> Tensor:
    """[V, T, E] of values [V, S]: at most one in a cell, so that no order of adding matters."""
    tokens, k = ids.shape
    cells = values.new_zeros(len(values), tokens, size)
    return cells.scatter_add_(2, ids.expand(len(values), -1, -1), values.view(-1, tokens, k))


def vector_sums(f: Tensor, ids: Tensor, size: int, counted: Tensor | None) -> Tensor:
    """[2, E, D] Σ f and Σ f² over the counted rows of each expert.

    Args:
        f: [S, D].
        ids: [S].
        counted: [S] 1 for a row that counts, 0 for one that does not; None: all do.
    """
    if f.device.type != "cpu":
        return dense_vector_sums(f, ids, size, counted)
    order = torch.argsort(ids, stable=True)
    if counted is not None:
        counted = counted[order, None]
    total = f.new_zeros(2, size, f.shape[-1], dtype=torch.float64)
    start, f = 0, f[order]
    for e, end in enumerate(torch.bincount(ids, minlength=size).cumsum(0).tolist()):
        if end > start:
            rows = f[start:end].double()
            if counted is not None:
                rows = rows * counted[start:end]
            torch.sum(rows, 0, out=total[0, e])
            torch.sum(rows.square_(), 0, out=total[1, e])
        start = end
    return total


def dense_vector_sums(f: Tensor, ids: Tensor, size: int, counted: Tensor | None) -> Tensor:
    """`vector_sums` by products with a matrix of ones and zeros, ROWS rows at a time.

    Of so many rows an expert's are added in float32 at least; what comes of them in float64.
    """
    precise, width = torch.promote_types(f.dtype, torch.float32), f.shape[-1]
    ones = f.new_ones(len(f), 1, dtype=precise) if counted is None else counted[:, None].to(precise)
    chosen = ones.new_zeros(len(f), size).scatter_(1, ids[:, None], ones)
    lacking = -len(f) % ROWS
    f, chosen = (nn.functional.pad(t, (0, 0, 0, lacking)) if lacking else t for t in (f, chosen))
    total = f.new_zeros(2, size, width, dtype=torch.float64)
    step = max(1, CELLS // (ROWS * width))
    chosen = chosen.view(-1, ROWS, size).transpose(1, 2)
    for rows, part in zip(f.view(-1, ROWS, width).split(step), chosen.split(step), strict=True):
        rows = rows.to(precise)
        for which, values in enumerate((rows, rows.square())):
            total[which] += (part @ values).sum(0, dtype=torch.float64)
    return total


def weight_sums(p: Tensor) -> Tensor:
    """[2, E] Σ|w| and Σw² of each expert's matrix, from [E, ...]."""
    p = p.detach()
    if p.device.type != "cpu":  # in pieces: experts that are packed are unpacked for it
        pieces = p.split(max(1, WEIGHTS // p[0].numel()))
        return torch.cat([dense_weight_sums(as_plain(x)) for x in pieces], 1)
    rows = p.flatten(1)
    found = []
    # two rows at least: a sum of one alone is shared out among threads, and rounds as they are many
    for part in rows.split(max(2, WIDENED // rows.shape[1])):
        wide = as_plain(part).to(torch.float64, copy=True).abs_()
        found.append(torch.stack([wide.sum(1), wide.square_().sum(1)]))
    return torch.cat(found, 1)


def dense_weight_sums(p: Tensor) -> Tensor:
    """`weight_sums` line by line in float32 at least, of which float64 sums are made: reading in
    float64 takes ten times as long where the device's float64 is fast, and more elsewhere."""
    precise = torch.promote_types(p.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(p, n, -1, dtype=precise).double() for n in (1, 2)]
    return torch.stack([norms[0].flatten(1).sum(1), norms[1].square().flatten(1).sum(1)])
