"""Which model on which data: the settings that every vision run has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from moe_fair.core.quote import quote
from moe_fair.core.registry import check_settings


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model, data and where they run; kinds of run add their own settings.

    Attributes:
        model: Hub id, folder, `module:function`, or a pruned checkpoint.
        data: `digits`, a folder of class folders, or a data set's id.
        batch_size: images in a forward; seed: of everything that is drawn.
        weights, image_size, mean, std: of a `module:function` model.
        device: auto, cpu, cuda, ...
    """

    model: str
    data: str
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
        for name in ("model", "data", "weights"):
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, str(value))
            elif not isinstance(value, str) and not (name == "weights" and value is None):
                raise ValueError(f"{name} must be text or a path, not {quote(value)}")

    @classmethod
    def check_names(cls, values: Iterable[str]) -> None:
        """Every name is a setting.

        Raises:
            ValueError: one is not; says the nearest.
        """
        check_settings(values, [f.name for f in fields(cls)])

    def check_least(self, **least: int) -> None:
        """No setting is below its least value.

        Raises:
            ValueError: one is.
        """
        for name, value in {**least, "batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < value:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)} is below {value}")

    def plain(self) -> dict[str, Any]:
        """What was set, for JSON."""
        found = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def weights_path(self) -> Path | None:
        """The file that --weights names."""
        return Path(self.weights) if self.weights else None
