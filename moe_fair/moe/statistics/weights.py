"""Each expert's matrices, for criteria without data: AIMER (arXiv 2603.18492)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.segments import weight_sums
from moe_fair.moe.statistic import Statistic

name = "weights"
collected = "always"
names = {
    "weight_abs": Statistic("E", "Σ |w|", kind="constant"),
    "weight_sq": Statistic("E", "Σ w²", kind="constant"),
    "weight_count": Statistic("E", "number of w", kind="constant"),
}


def constants(block: MoeBlock) -> dict[str, Tensor]:
    """[E] each."""
    matrices = block.matrices()
    total = sum(weight_sums(p) for p in matrices)
    assert isinstance(total, Tensor)
    count = float(sum(p[0].numel() for p in matrices))
    return {
        "weight_abs": total[0],
        "weight_sq": total[1],
        "weight_count": torch.full((block.num_experts,), count, dtype=torch.float64),
    }
