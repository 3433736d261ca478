"""Every setting of a vision run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_fair.core.registry import nearest, pick
from moe_fair.core.sizes import parse_bytes
from moe_fair.vision.run_settings import GRADUAL as WHILE_TRAINING
from moe_fair.vision.run_settings import PRUNE, RUN, SCORE, TARGET, TRAIN, Subject, given

if TYPE_CHECKING:  # the command's options are made from the fields below, without torch
    from moe_fair.core.criterion import Criterion
    from moe_fair.vision.finetune import Training
    from moe_fair.vision.gradual import Schedule

TARGETS = ("ratio", "flops", "params", "tolerance")
# what belongs to one of the two ways of pruning only
SCORED = (
    "removal", "protection", "allocate", "samples", "directions", "memory", "steps",
)  # fmt: skip
# what allocators of experts need, and no statistics of images hold
UNMEASURED = {
    "costs": "measured cost curves",
    "rows": "rows of Taylor values per sequence of text",
    "gram": "the Gram matrix of outputs",
}
GRADUAL = ("units_per_step", "minibatches", "momentum", "probes")


@dataclass(frozen=True, kw_only=True)
class Settings(Subject):
    """All settings of `moe-fair vision prune`; each field says what it is."""

    ratio: float | None = given(None, "Share of the units removed, 0 to 1", TARGET, (PRUNE,))
    flops: float | None = given(None, "Share of the multiply-adds removed", TARGET, (PRUNE,))
    params: float | None = given(None, "Share of the parameters removed", TARGET, (PRUNE,))
    tolerance: float | None = given(
        None, "ToD's α and no budget: each group goes as deep as it allows", TARGET, (PRUNE,)
    )
    removal: str = given(
        "u-score",
        "Criterion whose lowest scores leave: u-score, l1, l2, bn-scale, hrank, taylor, taylor-sq, "
        "taylor-so, taylor-logits, taylor-logits-sq, taylor-weight or random",
        SCORE, (PRUNE,),
    )  # fmt: skip
    protection: str = given(
        "taylor", "Criterion whose highest scores are protected", SCORE, (PRUNE,)
    )
    allocate: str = given("tod", "tod, uniform, global or global-normalised", SCORE, (PRUNE,))
    method: str | None = given(
        None,
        "In place of the scores: taylor-fo, taylor-so or taylor-bn, units leave a few at a time "
        "while the model trains",
        WHILE_TRAINING, (PRUNE,),
    )  # fmt: skip
    units_per_step: int | None = given(
        None, "Units that leave after a step", WHILE_TRAINING, (PRUNE,),
        usual="100, or a hundredth of fewer than 10,000",
    )  # fmt: skip
    minibatches: int | None = given(
        None, "Minibatches of a step", WHILE_TRAINING, (PRUNE,), usual="30"
    )
    momentum: float | None = given(
        None, "Share of earlier steps in a unit's score", WHILE_TRAINING, (PRUNE,), usual="0.9"
    )
    probes: int | None = given(
        None,
        "Random directions per minibatch for taylor-so's second derivatives; as many as units is "
        "exact",
        WHILE_TRAINING, (PRUNE,), usual="1",
    )  # fmt: skip
    min_channels: int = given(1, "Fewest units kept in any group", SCORE, (PRUNE,), minimum=1)
    align: int = given(
        1, "Kept counts are multiples of this; smaller groups stay whole", SCORE, (PRUNE,),
        minimum=1,
    )  # fmt: skip
    heads: bool = given(False, "Attention heads are units too", SCORE, (PRUNE,))
    samples: int = given(640, "Images for the scores", SCORE, (PRUNE,), minimum=2)
    directions: int = given(128, "Projections of the sliced distance", SCORE, (PRUNE,), minimum=1)
    memory: int = given(
        1 << 30, "For the U-Score's projections; less means more passes", RUN, (PRUNE,),
        minimum=1, flags=("--max-memory",), usual="1GiB",
        parse=lambda text: parse_bytes("--max-memory", text),
    )  # fmt: skip
    steps: int = given(
        1, "Prune in so many steps, fine-tune and score again after each", TRAIN, (PRUNE,),
        minimum=1,
    )  # fmt: skip
    finetune_epochs: int = given(0, "Epochs after each step", TRAIN, (PRUNE,), minimum=0)
    optimizer: str = given(
        "sgd", "sgd (lr .001, momentum .9) or adamw (lr .0005, cosine to 0)", TRAIN, (PRUNE,)
    )
    learning_rate: float | None = given(
        None, "Learning rate in place of the preset's", TRAIN, (PRUNE,), flags=("--lr",)
    )
    distill: float = given(
        0.0, "Weight of the dense model's outputs in the loss, 0 to 1", TRAIN, (PRUNE,)
    )

    def __post_init__(self) -> None:
        if isinstance(self.memory, str):
            object.__setattr__(self, "memory", parse_bytes("memory", self.memory))
        super().__post_init__()
        targets = [t for t in TARGETS if getattr(self, t) is not None]
        if len(targets) != 1:
            names = " and ".join("--" + t for t in targets) or "none"
            raise ValueError(
                f"give exactly one target (--ratio, --flops, --params or --tolerance); got {names}"
            )
        share = getattr(self, targets[0])
        if not 0 <= share <= 1 or (share == 1 and targets[0] != "tolerance"):
            raise ValueError(f"--{targets[0]} {share:g} is not between 0 and 1")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"--distill {self.distill:g} is not between 0 and 1")
        if self.distill and not self.finetune_epochs and self.method is None:
            raise ValueError("--distill acts in fine-tuning: give --finetune-epochs too")
        if self.steps > 1 and not self.finetune_epochs:
            raise ValueError("--steps fine-tunes between the steps: give --finetune-epochs too")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--lr {self.learning_rate:g} is not above 0")
        from moe_fair.core.allocate import allocator, allocators, needs  # all of these import torch
        from moe_fair.vision.criteria import criterion
        from moe_fair.vision.finetune import LEARNING_RATES

        self._check_method()
        rule = allocator(self.allocate)
        if missing := [text for what, text in UNMEASURED.items() if needs(rule, what)]:
            rules = allocators().items()
            usable = [n for n, r in rules if not any(needs(r, w) for w in UNMEASURED)]
            raise ValueError(
                f"--allocate {self.allocate} needs {missing[0]}, which no run on images measures: "
                f"take {', '.join(usable)}"
            )
        if self.method is None and self.tolerance is not None and not rule.needs_protection:
            raise ValueError(f"--tolerance is ToD's; --allocate {self.allocate} takes a share")
        pick(LEARNING_RATES, self.optimizer, "optimizer")
        criterion(self.removal)
        criterion(self.protection)

    def _check_method(self) -> None:
        from moe_fair.vision.gradual import METHODS

        names = ", ".join(METHODS)
        if self.method is None:
            for name in GRADUAL:
                if getattr(self, name) is not None:
                    raise ValueError(f"--{_flag(name)} belongs to --method: give one of {names}")
            return
        if self.method not in METHODS:
            raise ValueError(
                f"--method {self.method!r} is not one of {names}{nearest(self.method, METHODS)}"
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
        from moe_fair.core.allocate import allocator
        from moe_fair.vision.criteria import criterion

        paired = allocator(self.allocate).needs_protection
        return criterion(self.removal), criterion(self.protection) if paired else None

    def schedule(self, units: int) -> Schedule:
        """How units leave a model that has so many of them, with `method`."""
        from moe_fair.vision.gradual import (
            MINIBATCHES,
            MOMENTUM,
            PROBES,
            Schedule,
            default_units,
        )

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
        """How the model is fine-tuned."""
        from moe_fair.vision.finetune import Training

        return Training(
            epochs=self.finetune_epochs,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            distill=self.distill,
            batch_size=self.batch_size,
            seed=self.seed,
        )


def _flag(name: str) -> str:
    return {"memory": "max-memory"}.get(name, name.replace("_", "-"))
