"""Every setting of a `vision sparsify` run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

from moe_fair.core.registry import pick
from moe_fair.vision.run_settings import SPARSE, SPARSIFY, Subject, given

REPAIRS = {"none": "nothing", "variance": "channelwise variance matching"}


@dataclass(frozen=True, kw_only=True)
class SparseSettings(Subject):
    """All settings of `moe-fair vision sparsify`.

    The data's labels serve for the accuracy that is reported and nothing else.
    """

    sparsity: float = given(
        MISSING, "Share of the weights that are zero, 0 to 1", SPARSE, (SPARSIFY,)
    )
    allocate: str = given(
        "lamp", "uniform, erk, lamp, global, tod, rr or rr-erk", SPARSE, (SPARSIFY,)
    )
    repair: str = given(
        "variance", "variance (every channel's mean and variance as before) or none", SPARSE,
        (SPARSIFY,),
    )  # fmt: skip
    shrinkage: float | None = given(
        None,
        "Holds the repair of channels back that have little signal left; 0 does not",
        SPARSE, (SPARSIFY,), usual="0.003",
    )  # fmt: skip
    samples: int = given(
        256,
        "Images for allocation and repair, without their labels; the repair runs all of them in "
        "one forward",
        SPARSE, (SPARSIFY,), minimum=2,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"--sparsity {self.sparsity:g} is not between 0 and 1 (the share of zeros)"
            )
        from moe_fair.vision.sparse.rules import rule  # imports torch

        rule(self.allocate)
        pick(REPAIRS, self.repair, "repair")
        if self.shrinkage is not None and self.repair == "none":
            raise ValueError("--shrinkage belongs to --repair variance; there is no repair")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"--shrinkage {self.strength:g} is not 0 or more")

    @property
    def strength(self) -> float:
        """λ of the repair."""
        from moe_fair.vision.sparse.repair import SHRINKAGE

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
