"""Allocators: scores and a target in, a budget per group out. One file each.

A module here with `name`, `needs_protection` and `allocate(ranked, remove, tolerance)` is an
allocator; another package adds its own through the entry point group `moe_fair.allocators`. With
`needs_costs = True` the ranked groups bring measured cost curves. What else it takes from the
statistics it says in `inputs`, name -> function of a group's view, and finds in
`RankedGroup.inputs`; `needs` names the statistics that these read. It is tried once before anything
is measured, with statistics that are all 0. An allocator that chooses the units itself returns
their orders in the budget, and names the removal score that its choice stands for in `removal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

from moe_fair.core.ranking import RankedGroup
from moe_fair.core.registry import discover, pick
from moe_fair.core.units import Budget, GroupView


class Allocator(Protocol):
    """What an allocator module offers."""

    name: str
    needs_protection: bool

    def allocate(
        self,
        ranked: Sequence[RankedGroup],
        remove: int | None = None,
        tolerance: float | None = None,
    ) -> Budget: ...


def needs(rule: Allocator, what: str) -> bool:
    """Whether an allocator needs `costs`, `protection` or one of its `inputs` of its groups."""
    return bool(getattr(rule, f"needs_{what}", False)) or what in getattr(rule, "inputs", {})


def inputs_of(rule: Allocator, views: Iterable[GroupView]) -> dict[str, dict[str, Any]]:
    """What an allocator takes from each group's statistics, by the group's name.

    Args:
        views: looked at only where something is taken: a view sums all statistics of its group.
    """
    asked = getattr(rule, "inputs", {})
    if not asked:
        return {}
    return {v.group.name: {name: read(v) for name, read in asked.items()} for v in views}


@cache
def allocators() -> dict[str, Allocator]:
    """Every allocator by name."""
    found = discover(__name__, __path__, "moe_fair.allocators")
    return {m.name: m for m in found if hasattr(m, "allocate")}


def allocator(name: str) -> Allocator:
    """The allocator of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    return pick(allocators(), name, "allocator")
