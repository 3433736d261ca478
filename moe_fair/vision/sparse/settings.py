"""Every setting of a `vision sparsify` run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moe_fair.core.registry import nearest, pick
from moe_fair.vision.sparse.repair import SHRINKAGE
from moe_fair.vision.sparse.rules import rule

REPAIRS = {"none": "nothing", "variance": "channelwise variance matching"}


@dataclass(frozen=True)
class SparseSettings:
    """All settings of `moe-fair vision sparsify`.

    Attributes:
        model: Hub id, folder, `module:function`, or a pruned checkpoint.
        data: `digits`, a folder of class folders, or a data set's id; labels serve for the accuracy
            that is reported and nothing else.
        sparsity: share of the weights of convolutions and linear layers that are zero afterwards.
        allocate: the rule that shares it out; repair: `variance` or `none`; shrinkage: its λ.
        samples: images for the rule and the repair; batch_size: images in a forward of the rule.
        seed: draws the images.
        weights, image_size, mean, std: of a `module:function` model.
        device: auto, cpu, cuda, ...
    """

    model: str
    data: str
    sparsity: float
    allocate: str = "lamp"
    repair: str = "variance"
    shrinkage: float | None = None
    samples: int = 256
    batch_size: int = 64
    seed: int = 0
    weights: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
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
        for name, least in (("samples", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)} is below {least}")

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
        known = [f.name for f in fields(SparseSettings)]
        for name in values:
            if name not in known:
                raise ValueError(f"no setting {name!r}{nearest(name, known)}")
        return SparseSettings(**values)

    def plain(self) -> dict[str, Any]:
        """What was set, for JSON."""
        found = {k: v for k, v in asdict(self).items() if v is not None}
        if self.repair != "none":
            found["shrinkage"] = self.strength
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def weights_path(self) -> Path | None:
        return Path(self.weights) if self.weights else None
