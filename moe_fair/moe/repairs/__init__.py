"""Repairs: how the remaining experts' down projections make up for the experts that left.

A module here with `name`, `ridges` and `fit(routed, target, ridge)` is a repair; another package
adds its own through the entry point group `moe_fair.repairs`. Where it also has `check(experts)`,
that raises for experts which it cannot repair, before anything is measured. With `wants_text` it
has so many parameters that a short text is lengthened for it (`moe.resampled_text`); with `trains`
the layer is also distilled (`moe.layer_distillation`). With `path(routed, target, ridges, start)`,
which yields each ridge with its fit in an order of its own, one fit goes on from another.

Shape legend: T tokens, E experts, F hidden, D model.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

from torch import Tensor

from moe_fair.core.registry import discover, pick
from moe_fair.moe.routed_output import RoutedOutput, check_linear


class Repair(Protocol):
    """What a repair module offers.

    Attributes:
        ridges: the strengths of regularisation that are tried on a held-out share of the text.
    """

    name: str
    ridges: tuple[float, ...]

    def fit(self, routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
        """Down projections [E, F, D] with which `routed` comes near the target [T, D]."""
        ...


def check_repairable(kind: Repair, experts: Any) -> None:
    """This repair can be done on these experts.

    Raises:
        ValueError: it cannot; says why and what can.
    """
    check_linear(experts)
    if (check := getattr(kind, "check", None)) is not None:
        check(experts)


@cache
def repairs() -> dict[str, Repair]:
    """Every repair by name."""
    found = discover(__name__, __path__, "moe_fair.repairs")
    return {m.name: m for m in found if hasattr(m, "fit")}


def repair(name: str) -> Repair:
    """The repair of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    return pick(repairs(), name, "repair")
