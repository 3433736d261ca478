"""Scores of channels and other vision units, one rule a file; higher = keep.

A module here with a `criteria` tuple adds its rules; another package adds its own through the entry
point group `moe_fair.vision_criteria` (an object with the same attribute).
"""

from __future__ import annotations

from functools import cache

from moe_fair.core.criterion import Criterion
from moe_fair.core.registry import discover, pick


@cache
def criteria() -> dict[str, Criterion]:
    """Every criterion by name."""
    found = discover(__name__, __path__, "moe_fair.vision_criteria")
    return {c.name: c for m in found for c in getattr(m, "criteria", ())}


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    return pick(criteria(), name, "vision criterion")
