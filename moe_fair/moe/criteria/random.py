"""Random: seeded noise, the floor that every criterion must beat.

The seed is drawn from the group's name and the calibration set, so that another calibration seed
gives other scores and the same run the same ones.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] seeded noise, uniform in [0, 1)."""
    key = f"{view.group.name} {view.total_tokens} {view['gate'].sum().item():.6g}"
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(view.group.size, dtype=torch.float64, generator=generator)


criteria = (Criterion("random", ("gate",), "control", score),)
