"""How many weights each layer keeps, one rule a file.

A module here with `name`, `needs_images` and `allocate(net, keep)` is a rule; another package adds
its own through the entry point group `moe_fair.sparsity_rules`.

Every rule meets the total exactly, and keeps between one and all of each layer's weights that are
not zero yet: a layer without any would cut the network in two. That lower limit is ours.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from moe_fair.core.registry import discover, pick
from moe_fair.core.units import Budget
from moe_fair.vision.sparse.layers import Net


class Rule(Protocol):
    """What a rule module offers."""

    name: str
    needs_images: bool

    def allocate(self, net: Net, keep: int) -> Budget:
        """Weights kept per layer, `keep` in all."""
        ...


@cache
def rules() -> dict[str, Rule]:
    """Every rule by name."""
    found = discover(__name__, __path__, "moe_fair.sparsity_rules")
    return {m.name: m for m in found if hasattr(m, "allocate")}


def rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    return pick(rules(), name, "sparsity rule")
