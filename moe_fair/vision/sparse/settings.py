"""Every setting of a `vision sparsify` run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_fair.core.registry import pick
from moe_fair.vision.run_settings import Subject
from moe_fair.vision.sparse.repair import SHRINKAGE
from moe_fair.vision.sparse.rules import rule

REPAIRS = {"none": "nothing", "variance": "channelwise variance matching"}


@dataclass(frozen=True, kw_only=True)
class SparseSettings(Subject):
    """All settings of `moe-fair vision sparsify`.

    The data's labels serve for the accuracy that is reported and nothing else.

    Attributes (and those of `Subject`):
        sparsity: share of the weights of convolutions and linear layers that are zero afterwards.
        allocate: the rule that shares it out; repair: `variance` or `none`; shrinkage: its λ.
        samples: images for the rule and the repair.
    """

    sparsity: float
    allocate: str = "lamp"
    repair: str = "variance"
    shrinkage: float | None = None
    samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"--sparsity {self.sparsity:g} is not between 0 and 1 (the share of zeros)"
            )
        rule(self.allocate)
        pick(REPAIRS, self.repair, "repair")
        if self.shrinkage is not None and self.repair == "none":
            raise ValueError("--shrinkage belongs to --repair variance; there is no repair")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"--shrinkage {self.strength:g} is not 0 or more")
        self.check_least(samples=2)

    @property
    def strength(self) -> float:
        """λ of the repair."""
        return SHRINKAGE if self.shrinkage is None else self.shrinkage

    @staticmethod
    def of(values: dict[str, Any]) -> SparseSettings:
        """Settings from plain values.

        Raises:
            ValueError: an unknown name; says the nearest.
        """
        SparseSettings.check_names(values)
        return SparseSettings(**values)

    def plain(self) -> dict[str, Any]:
        """What was set, for JSON."""
        found = super().plain()
        if self.repair != "none":
            found["shrinkage"] = self.strength
        return found
