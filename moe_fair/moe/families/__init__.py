"""MoE blocks whose structure is an exception, one family a file.

A module here is a family: `blocks` names the classes of its blocks, and `view(name, block)` gives
the `MoeBlock` of one (a subclass that says what differs), or None where it must stay whole. Names
and not structure tell them apart, because what differs may not show in the structure (whether a
weight multiplies an expert's input or its output). Another package adds its own through the entry
point group `moe_fair.families` (an object with the same two attributes).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from moe_fair.core.registry import discover


@cache
def families() -> dict[str, Any]:
    """Every exceptional family by the name of its module."""
    found = discover(__name__, __path__, "moe_fair.families")
    return {m.__name__.rpartition(".")[2]: m for m in found}
