"""Products of what any two experts add to their layer's output: what a set's absence changes it by.

For `core.allocate.naee`, after NAEE (arXiv 2402.14800).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.segments import CELLS
from moe_fair.moe.statistic import Pass, Statistic

name = "gram"
names = {"gated_gram": Statistic("E E", "Σ ⟨g_e f_e, g_f f_f⟩ over tokens")}


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[E, E], some tokens at a time."""
    size, (tokens, k) = seen.size, seen.index.shape
    width = seen.f.shape[-1]
    ids, g, f = seen.index, seen.g.view(tokens, k), seen.f.view(tokens, k, width)
    if seen.counted is not None:
        g = g * seen.counted.view_as(g)
    total = g.new_zeros(size * size)
    step = max(1, CELLS // (k * width))
    for i in range(0, tokens, step):
        s = slice(i, i + step)
        v = f[s].double() * g[s].unsqueeze(-1)
        cell = ids[s].unsqueeze(2) * size + ids[s].unsqueeze(1)
        products = (v @ v.transpose(1, 2)).flatten()
        total += torch.bincount(cell.flatten(), weights=products, minlength=size * size)
    return {"gated_gram": total.view(size, size)}
