"""Global threshold on scores divided by their group's mean, so that a group's scale has no say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_fair.core.allocate.global_threshold import by_threshold
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "global-normalised"
needs_protection = False


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """One threshold over all units of `score / mean(|score|)` of the group.

    Raises:
        ValueError: a tolerance instead of a total, or a total that cannot be met.
    """
    scaled = [r.removal / max(float(np.abs(r.removal).mean()), 1e-300) for r in ranked]
    return by_threshold(name, ranked, scaled, remove)
