"""What a plan consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports torch
    from moe_fair.core.units import UnitGroup


@dataclass(frozen=True)
class Target:
    """What a plan must meet: exactly one of the fields is set.

    Attributes:
        mean_kept: units kept per group on average.
        total: units kept over all groups.
        ratio: share of all units that leave, 0 to 1.
        parameters, bytes: the most that the whole model may hold afterwards.
        tolerance: ToD's α, with no budget.
    """

    mean_kept: float | None = None
    total: int | None = None
    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            names = ", ".join(given) or "nothing"
            raise ValueError(
                "give exactly one target (--experts, --total, --ratio, --size or --tolerance); "
                f"got {names}"
            )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ValueError(f"--ratio {self.ratio:g} is not between 0 and 1 (the share removed)")
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise ValueError(f"--tolerance {self.tolerance:g} is not between 0 and 1")


@dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes of a whole checkpoint."""

    parameters: int
    bytes: int

    def without(self, groups: tuple[UnitGroup, ...], kept: Mapping[str, int]) -> ModelSize:
        """The size after every group is cut to `kept` units."""
        gone = [(g, g.size - kept[g.name]) for g in groups]
        return ModelSize(
            self.parameters - sum(g.unit_parameters * n for g, n in gone),
            self.bytes - sum(g.unit_bytes * n for g, n in gone),
        )


@dataclass(frozen=True)
class GroupPlan:
    """One group's part of a plan.

    Attributes:
        name, layer, size: of the unit group.
        kept: ids that stay, rising.
        tod: ToD at this depth, or None without protection scores.
        null_depth: depth that independent rankings would reach at the plan's tolerance.
        ceiling: deepest that any rankings reach at the plan's tolerance.
        removal, protection: the scores, [N].
        follows: of the unit group.
        merged: kept id -> id of each unit merged into it, itself included -> its weight there; of
            kept units that stand for themselves alone nothing.
    """

    name: str
    layer: int
    size: int
    kept: list[int]
    tod: float | None
    null_depth: float | None
    ceiling: int | None
    removal: list[float]
    protection: list[float] | None
    merged: dict[str, dict[str, float]] = field(default_factory=dict)
    follows: bool = False

    @property
    def depth(self) -> int:
        """Units removed."""
        return self.size - len(self.kept)


@dataclass(frozen=True)
class PlanFields:
    """Kept ids per group, and what led to them: what stands in a plan's file.

    Attributes (those that do not say it themselves):
        expert_parallel: numbers of devices that divide every group's kept units evenly, as
            expert-parallel serving wants it; always with 1.
        mtp: what becomes of heads for multi-token prediction: cut, drop, keep; None without any.
    """

    groups: list[GroupPlan]
    allocator: str
    removal: str
    protection: str | None
    tolerance: float | None
    explanation: dict[str, Any]
    target: dict[str, float]
    before: ModelSize
    after: ModelSize
    notes: list[str]
    fingerprint: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    expert_parallel: list[int] = field(default_factory=list)
    mtp: str | None = None

    @property
    def kept(self) -> dict[str, list[int]]:
        """Group name -> kept ids."""
        return {g.name: g.kept for g in self.groups}

    @property
    def merges(self) -> bool:
        """Units are merged into those that stay."""
        return any(g.merged for g in self.groups)

    @property
    def aligned(self) -> bool:
        """Units are merged neuron by neuron."""
        return self.merges and self.recipe.get("reduce") == "ream"

    @property
    def uniform(self) -> bool:
        """Every group keeps the same number of units."""
        return len({len(g.kept) for g in self.groups}) == 1
