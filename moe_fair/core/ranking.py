"""The order in which a group's units leave, the order in which they are protected, and the depths
at which the group may stop.

A *depth* is a number of removed units. Shape legend: N units, J allowed depths.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_fair.core.units import Scores, UnitGroup


@dataclass(frozen=True)
class RankedGroup:
    """One group, ready for an allocator.

    Attributes:
        group: the unit group.
        removal: [N] removal scores, low = leaves first.
        protection: [N] protection scores, high = protected first, or None.
        removal_order, protection_order: [N] unit ids; the first m of them are Remove(m) and
            Protect(m). In a group of several blocks the lowest (highest) of every block come before
            the second lowest (highest) of any, so that equal counts leave every block.
        depths: [J] allowed numbers of removed units, rising; the first is 0 unless a multiple
            forces more.
        costs: [N + 1] measured cost of every depth, or None (see `cost_curves`).
        inputs: what else an allocator asks for, by the names in its `inputs`.
    """

    group: UnitGroup
    removal: np.ndarray
    protection: np.ndarray | None
    removal_order: np.ndarray
    protection_order: np.ndarray | None
    depths: np.ndarray
    costs: np.ndarray | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Units between the first two depths (1 where there is but one)."""
        return int(self.depths[1] - self.depths[0]) if len(self.depths) > 1 else 1

    @property
    def even(self) -> bool:
        """All depths are one step from their neighbours."""
        return bool((np.diff(self.depths) == self.step).all())

    def kept(self, depth: int) -> list[int]:
        """Ids that stay when `depth` units leave, rising."""
        return sorted(self.removal_order[depth:].tolist())

    def removed_mass(self) -> np.ndarray:
        """[N + 1] share of the group's removal score that has left at depth 0..N.

        Scores that go below zero are measured from the lowest one; where all are equal every unit
        carries the same share.
        """
        mass = self.removal - min(0.0, float(self.removal.min()))
        total = mass.sum()
        shares = mass / total if total > 0 else np.full(len(mass), 1 / len(mass))
        return np.concatenate([[0.0], np.cumsum(shares[self.removal_order])])


def rank(
    groups: tuple[UnitGroup, ...],
    removal: Scores,
    protection: Scores | None = None,
    *,
    min_units: int = 0,
    multiple_of: int = 1,
    counts: Collection[int] | None = None,
    costs: Mapping[str, np.ndarray] | None = None,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[RankedGroup]:
    """Order every group's units and list its allowed depths.

    Args:
        min_units: fewest units kept in any group, on top of each group's own floor.
        multiple_of: kept counts must be a multiple of this.
        counts: kept counts are among these; None for any.
        costs, inputs: of every group, see `RankedGroup`.

    Raises:
        ValueError: a group has no allowed depth.
    """
    ranked = []
    for group in groups:
        u = removal.values[group.name].numpy()
        r = protection.values[group.name].numpy() if protection else None
        ranked.append(
            RankedGroup(
                group=group,
                removal=u,
                protection=r,
                removal_order=block_order(u, group.blocks),
                protection_order=None if r is None else block_order(-r, group.blocks),
                depths=depths(group, min_units, multiple_of, counts),
                costs=costs[group.name] if costs else None,
                inputs=inputs[group.name] if inputs else {},
            )
        )
    return ranked


def block_order(values: np.ndarray, blocks: int = 1) -> np.ndarray:
    """[N] ids by rising value, ties by id; with blocks, rank within the block comes first."""
    n = len(values)
    by_block = np.argsort(values.reshape(blocks, n // blocks), axis=1, kind="stable")
    rank_in_block = np.empty_like(by_block)
    np.put_along_axis(rank_in_block, by_block, np.arange(n // blocks)[None, :], axis=1)
    return np.lexsort((np.arange(n), values, rank_in_block.ravel()))


def depths(
    group: UnitGroup,
    min_units: int = 0,
    multiple_of: int = 1,
    counts: Collection[int] | None = None,
) -> np.ndarray:
    """[J] allowed numbers of removed units, rising.

    Raises:
        ValueError: there is none.
    """
    step = math.lcm(multiple_of, group.blocks, group.multiple)
    least = -(-max(group.floor, min_units) // step) * step
    most = group.size // step * step
    if least > most:
        raise ValueError(
            f"{group.name}: no allowed number of units: at least {max(group.floor, min_units)} of "
            f"{group.size} must stay, in a multiple of {step}; lower --min-experts or --multiple-of"
        )
    found = np.arange(group.size - most, group.size - least + 1, step)
    if counts is not None:
        found = found[np.isin(group.size - found, list(counts))]
        if not len(found):
            raise ValueError(
                f"{group.name}: of the counts that are allowed ({_few(counts)}) none is from "
                f"{least} to {most} in steps of {step}"
            )
    return found


def _few(counts: Collection[int]) -> str:
    """Some of the counts, in words."""
    first = sorted(counts)
    return ", ".join(map(str, first)) if len(first) < 20 else f"{first[0]} to {first[-1]}"
