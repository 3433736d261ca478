"""Every setting of a vision run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_fair.core.allocate import allocator
from moe_fair.core.criterion import Criterion
from moe_fair.core.registry import nearest, pick
from moe_fair.vision.criteria import criterion
from moe_fair.vision.finetune import LEARNING_RATES, Training
from moe_fair.vision.gradual import (
    METHODS,
    MINIBATCHES,
    MOMENTUM,
    PROBES,
    Schedule,
    default_units,
)
from moe_fair.vision.run_settings import Subject

TARGETS = ("ratio", "flops", "params", "tolerance")
# what belongs to one of the two ways of pruning only
SCORED = (
    "removal", "protection", "allocate", "samples", "directions", "memory", "steps",
)  # fmt: skip
GRADUAL = ("units_per_step", "minibatches", "momentum", "probes")


@dataclass(frozen=True, kw_only=True)
class Settings(Subject):
    """All settings of `moe-fair vision prune`.

    Attributes (and those of `Subject`):
        ratio, flops, params: share of the channels, multiply-adds or parameters that leaves;
            tolerance: ToD's α instead. Exactly one of the four.
        removal, protection: criteria; allocate: the rule that shares out the budget.
        method: instead of the three, units leave while the model trains, see `gradual`;
            units_per_step, minibatches, momentum, probes: of its schedule.
        min_channels: fewest units kept in any group; align: kept counts are multiples of this.
        heads: attention heads are units too.
        samples, directions: of the scores.
        memory: bytes for the U-Score's projections.
        steps: prune in so many steps, fine-tuning and scoring again after each.
        finetune_epochs, optimizer, learning_rate, distill: fine-tuning after each step.
    """

    ratio: float | None = None
    flops: float | None = None
    params: float | None = None
    tolerance: float | None = None
    removal: str = "u-score"
    protection: str = "taylor"
    allocate: str = "tod"
    method: str | None = None
    units_per_step: int | None = None
    minibatches: int | None = None
    momentum: float | None = None
    probes: int | None = None
    min_channels: int = 1
    align: int = 1
    heads: bool = False
    samples: int = 640
    directions: int = 128
    memory: int = 1 << 30
    steps: int = 1
    finetune_epochs: int = 0
    optimizer: str = "sgd"
    learning_rate: float | None = None
    distill: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [t for t in TARGETS if getattr(self, t) is not None]
        if len(given) != 1:
            names = " and ".join("--" + t for t in given) or "none"
            raise ValueError(
                f"give exactly one target (--ratio, --flops, --params or --tolerance); got {names}"
            )
        share = getattr(self, given[0])
        if not 0 <= share <= 1 or (share == 1 and given[0] != "tolerance"):
            raise ValueError(f"--{given[0]} {share:g} is not between 0 and 1")
        self.check_least(
            min_channels=1, align=1, samples=2, directions=1, steps=1, finetune_epochs=0, memory=1
        )
        self._check_method()
        if not 0 <= self.distill <= 1:
            raise ValueError(f"--distill {self.distill:g} is not between 0 and 1")
        if self.distill and not self.finetune_epochs and self.method is None:
            raise ValueError("--distill acts in fine-tuning: give --finetune-epochs too")
        if self.steps > 1 and not self.finetune_epochs:
            raise ValueError("--steps fine-tunes between the steps: give --finetune-epochs too")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--lr {self.learning_rate:g} is not above 0")
        rule = allocator(self.allocate)
        if self.method is None and self.tolerance is not None and not rule.needs_protection:
            raise ValueError(f"--tolerance is ToD's; --allocate {self.allocate} takes a share")
        pick(LEARNING_RATES, self.optimizer, "optimizer")
        criterion(self.removal)
        criterion(self.protection)

    def _check_method(self) -> None:
        if self.method is None:
            for name in GRADUAL:
                if getattr(self, name) is not None:
                    raise ValueError(f"--{_flag(name)} belongs to --method: give one of {_METHODS}")
            return
        if self.method not in METHODS:
            raise ValueError(
                f"--method {self.method!r} is not one of {_METHODS}{nearest(self.method, METHODS)}"
            )
        if self.tolerance is not None:
            raise ValueError("--tolerance is ToD's; --method takes --ratio, --flops or --params")
        for name in ("units_per_step", "minibatches", "probes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{_flag(name)} {value} is below 1")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum {self.momentum:g} is not from 0 to below 1")
        if self.probes is not None and self.method != "taylor-so":
            raise ValueError("--probes is of --method taylor-so's second derivatives")

    @staticmethod
    def of(values: dict[str, Any]) -> Settings:
        """Settings from plain values.

        Raises:
            ValueError: an unknown name (says the nearest), or one that the method does not use.
        """
        Settings.check_names(values)
        if values.get("method") is not None:
            for name in SCORED:
                if name in values:
                    raise ValueError(
                        f"--{_flag(name)} is not used with --method {values['method']}, which "
                        "scores in training: leave one of the two out"
                    )
        return Settings(**values)

    def plain(self) -> dict[str, Any]:
        """What was set and is used, for JSON."""
        unused = SCORED if self.method is not None else ()
        return {k: v for k, v in super().plain().items() if k not in unused}

    def scores(self) -> tuple[Criterion, Criterion | None]:
        """The removal score, and the protection score where the allocator needs one."""
        paired = allocator(self.allocate).needs_protection
        return criterion(self.removal), criterion(self.protection) if paired else None

    def schedule(self, units: int) -> Schedule:
        """How units leave a model that has so many of them, with `method`."""
        assert self.method is not None

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Schedule(
            self.method,
            given(self.units_per_step, default_units(units)),
            given(self.minibatches, MINIBATCHES),
            given(self.momentum, MOMENTUM),
            given(self.probes, PROBES),
        )

    def training(self) -> Training:
        return Training(
            epochs=self.finetune_epochs,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            distill=self.distill,
            batch_size=self.batch_size,
            seed=self.seed,
        )


_METHODS = ", ".join(METHODS)


def _flag(name: str) -> str:
    return {"memory": "max-memory"}.get(name, name.replace("_", "-"))
