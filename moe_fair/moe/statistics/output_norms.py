"""How large each expert's outputs f are, before and after their weight g.

With x and y the layer's input and routed output. Used by EAN and REAP (arXiv 2510.13999), MAN and
MSAN (arXiv 2606.15716) and EASY-EP's public code (the turn, 1 − cos(x, x + y)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.statistic import Pass, Statistic

TINY = 1e-8  # a norm that a quotient can have below it
name = "output_norms"
collected = "always"
names = {
    "norm": Statistic("E", "Σ ‖f‖"),
    "norm_sq": Statistic("E", "Σ ‖f‖²"),
    "gated_norm": Statistic("E", "Σ g‖f‖"),
    "gated_norm_sq": Statistic("E", "Σ (g‖f‖)²"),
    "turned_norm": Statistic("E", "Σ g‖f‖ (1 − cos(x, x + y))"),
}


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[E] each."""
    norm = torch.linalg.vector_norm(seen.f, dim=-1, dtype=seen.precise).double()
    gated = seen.g * norm
    x = seen.x.double()  # 1 - cos cancels where a layer turns little
    out = x + seen.y
    sizes = [torch.linalg.vector_norm(v, dim=-1).clamp(min=TINY) for v in (x, out)]
    turn = 1 - torch.linalg.vecdot(x, out) / (sizes[0] * sizes[1])
    return seen.per_expert(
        {
            "norm": norm,
            "norm_sq": norm.square(),
            "gated_norm": gated,
            "gated_norm_sq": gated.square(),
            "turned_norm": gated * turn[seen.token],
        }
    )
