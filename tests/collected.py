"""What tests collect, family by family."""

from __future__ import annotations

from moe_fair.moe.statistics import Collected, collecting, names_of
from moe_fair.moe.statistics.output_norms import names as NORMS
from moe_fair.moe.statistics.output_vectors import names as OUTPUTS
from moe_fair.moe.statistics.routing import names as ROUTING

FORWARD = (*ROUTING, *NORMS)
VECTORS = tuple(OUTPUTS)
TAYLOR = ("taylor", "taylor_abs", "taylor_sq")


def families(*more: str, taylor: bool = True) -> Collected:
    """What needs no gradient, gate Taylor where it is wanted, and more families by name."""
    plain = ("routing", "output_norms", "output_vectors", "weights")
    names = names_of(*plain, *(["taylor"] if taylor else []), *more)
    return collecting(names, backward=taylor)
