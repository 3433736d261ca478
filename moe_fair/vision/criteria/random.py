"""Random: seeded noise, the floor that every criterion must beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] uniform in [0, 1), from the group's name and the run's seed."""
    key = f"{view.group.name} {int(view['seed'][0])}"
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(view.group.size, dtype=torch.float64, generator=generator)


criteria = (Criterion("random", ("seed",), "control", score),)
