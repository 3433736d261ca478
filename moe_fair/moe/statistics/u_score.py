"""Distributions of each expert's gated outputs per calibration domain, on fixed directions.

For the U-Score of FAIR-Pruner (arXiv 2508.02291), the sliced Wasserstein distance between domains;
`core.sketch` keeps them in bounded memory.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.sketch import directions
from moe_fair.moe.statistic import Pass, Statistic

name = "u_score"
names = {"sketch": Statistic("S P", "g f on P directions", kind="sketch")}


def accumulate(seen: Pass) -> dict[str, Tensor]:
    """[S, P]."""
    axes = directions(seen.f.shape[-1]).to(seen.f.device)
    projected = seen.f.to(seen.precise) @ axes.to(seen.precise)
    return {"sketch": projected * seen.g.to(seen.precise)[:, None]}
