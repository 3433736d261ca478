"""What is collected of routed experts, one family of statistics a file.

A module here with `name` and `names` is a family (see `moe.statistic.Family`); another package adds
its own through the entry point group `moe_fair.statistics` (an object with the same attributes).
Criteria ask for statistics by name, and a family is collected where one of its names is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moe_fair.core.registry import discover
from moe_fair.core.sketch import Sketch
from moe_fair.core.units import GroupView, UnitGroup
from moe_fair.moe.statistic import Family, Statistic


@cache
def families() -> dict[str, Family]:
    """Every family by name.

    Raises:
        ValueError: two collect a statistic of one name.
    """
    found = discover(__name__, __path__, "moe_fair.statistics")
    named = {m.name: m for m in found if hasattr(m, "names")}
    owner: dict[str, str] = {}
    for family in named.values():
        for name in family.names:
            if owner.setdefault(name, family.name) != family.name:
                raise ValueError(
                    f"the statistics {owner[name]!r} and {family.name!r} both have a {name!r}; "
                    "rename one"
                )
    return named


@cache
def statistics() -> dict[str, Statistic]:
    """Every statistic by name."""
    return {name: s for family in families().values() for name, s in family.names.items()}


def offered(some: Iterable[Family], part: str) -> list[tuple[Family, Callable[..., Any]]]:
    """Those of some families that have a function of this name, with it."""
    return [(f, getattr(f, part)) for f in some if hasattr(f, part)]


@dataclass(frozen=True)
class Collected:
    """What is collected in one run over the text.

    Attributes:
        names: of the families, in the order of the registry.
        backward: with a backward; without, a family collects what needs no gradient.
    """

    names: tuple[str, ...]
    backward: bool

    def __contains__(self, family: str) -> bool:
        return family in self.names

    def families(self) -> Iterator[Family]:
        """The families themselves."""
        return (families()[n] for n in self.names)

    def statistics(self) -> dict[str, Statistic]:
        """Name -> each statistic that is collected."""
        return {
            name: s
            for family in self.families()
            for name, s in family.names.items()
            if self.backward or not s.needs_backward
        }


def names_of(*names: str) -> set[str]:
    """The statistics of some families."""
    return {n for f in names for n in families()[f].names}


def unasked(*when: str) -> set[str]:
    """The statistics that are collected `always`, or that `calibrate` collects as `usual`."""
    return names_of(*(n for n, f in families().items() if getattr(f, "collected", "") in when))


def collecting(
    asked: Iterable[str], without: Iterable[str] = (), *, backward: bool = True
) -> Collected:
    """The families that have these statistics.

    Args:
        asked: names of statistics.
        without: families that are left out, whatever is asked.
        backward: False: what needs a gradient is left out as well.

    Raises:
        ValueError: no family has a statistic that is asked for.
    """
    asked = set(asked)
    for name in sorted(asked - statistics().keys()):
        raise ValueError(
            f"no family of statistics has {name!r}; whoever needs it must bring one (entry point "
            "group moe_fair.statistics)"
        )
    backward = backward and any(statistics()[n].needs_backward for n in asked)
    chosen = (
        f.name
        for f in families().values()
        if asked & f.names.keys()
        and f.name not in without
        and (backward or not all(s.needs_backward for s in f.names.values()))
    )
    return Collected(tuple(chosen), backward)


def usual() -> Collected:
    """What `calibrate` collects where nothing is asked for."""
    return collecting(unasked("always", "usual"))


def zeros(group: UnitGroup, names: Iterable[str]) -> GroupView:
    """A group's view before anything is measured: these statistics, of one token, all 0."""
    wanted = {n: statistics()[n] for n in names}
    one = torch.ones(1, dtype=torch.float64)
    made = {
        n: torch.zeros([group.size if x == "E" else 1 for x in s.shape.split()]).double()
        for n, s in wanted.items()
        if s.kind not in ("row", "sketch")
    }
    return GroupView(
        group=group,
        sums=made,
        constants={},
        rows=torch.zeros(1, group.size, dtype=torch.float64),
        row_weights=one,
        total_tokens=1.0,
        total_sequences=1.0,
        by_domain={n: t.unsqueeze(0) for n, t in made.items()},
        domain_weights=one,
        domain_tokens=one,
        sketch=Sketch(1, group.size),
    )
