"""moe_fair: prune the routed experts of Hugging Face mixture-of-experts models.

    import moe_fair
    statistics = moe_fair.calibrate("Qwen/Qwen1.5-MoE-A2.7B-Chat", calibration="python=code.jsonl")
    plan = moe_fair.plan(statistics, experts=40)
    moe_fair.prune("Qwen/Qwen1.5-MoE-A2.7B-Chat", "out", plan=plan)

Settings are those of `moe_fair.Recipe`. Heavy packages load when a function is called.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moe_fair.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_fair.core.plan import Plan
    from moe_fair.core.recipe import Recipe
    from moe_fair.core.units import Statistics
    from moe_fair.pipelines.moe import Pruned

T = TypeVar("T")

__all__ = ["Plan", "Pruned", "Recipe", "Statistics", "calibrate", "plan", "prune"]

_HOMES = {
    "Plan": "moe_fair.core.plan",
    "Pruned": "moe_fair.pipelines.moe",
    "Recipe": "moe_fair.core.recipe",
    "Statistics": "moe_fair.core.units",
}


def calibrate(
    model: str | PathLike[str], output: str | PathLike[str] | None = None, **settings: Any
) -> Statistics:
    """Run calibration text through a model and gather statistics of every routed expert.

    Args:
        model: local directory or Hub id.
        output: a new directory to save the statistics to.
        settings: see `Recipe` (calibration, samples, length, seed, dtype, for_, ...).

    Raises:
        ValueError: bad input; one line says what, which, why and what to do.
    """
    from moe_fair.core.recipe import Recipe, check_taken
    from moe_fair.engines.processes import current_team
    from moe_fair.pipelines import moe as pipeline

    recipe = Recipe().with_settings({"model": model, **settings})
    check_taken(settings, "calibrate")
    statistics = pipeline.calibrate(recipe, None if output is None else _path("output", output))
    everywhere = current_team().broadcast(lambda: statistics)
    assert everywhere is not None  # the first process has them
    return everywhere


def plan(statistics: Statistics | str | PathLike[str], **settings: Any) -> Plan:
    """Decide which experts stay, in milliseconds.

    Args:
        statistics: from `calibrate`, or the directory that it saved.
        settings: a target (experts, total, ratio, size or tolerance), and see `Recipe` (method,
            removal, protection, allocate, min_experts, multiple_of, weights).

    Raises:
        ValueError: the target cannot be met, or the statistics do not hold what the method needs.
    """
    from moe_fair.core.recipe import Recipe, check_taken
    from moe_fair.core.units import Statistics
    from moe_fair.pipelines.plan import plan as make

    recipe = Recipe().with_settings(settings)
    check_taken(settings, "plan")
    return make(_loaded("statistics", statistics, Statistics), recipe)


def prune(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    plan: Plan | str | PathLike[str] | None = None,
    statistics: Statistics | str | PathLike[str] | None = None,
    **settings: Any,
) -> Pruned:
    """Cut a model's experts and save a checkpoint that loads with transformers.

    Args:
        model: local directory or Hub id.
        output: a new or empty directory.
        plan, statistics: made before, as objects or paths; otherwise both are made here.
        settings: a target unless a plan is given, and see `Recipe`.

    Raises:
        ValueError: bad input; one line says what, which, why and what to do.
    """
    from moe_fair.core.plan import Plan
    from moe_fair.core.recipe import Recipe, check_taken
    from moe_fair.core.units import Statistics
    from moe_fair.pipelines import moe as pipeline
    from moe_fair.pipelines.unused_settings import check_untargeted

    check_taken(settings, "prune")
    if plan is not None:
        check_untargeted(settings)
    recipe = Recipe().with_settings({"model": model, **settings})
    return pipeline.prune(
        recipe,
        _path("output", output),
        statistics=None if statistics is None else _loaded("statistics", statistics, Statistics),
        ready=None if plan is None else _loaded("plan", plan, Plan),
    )


def _path(name: str, value: Any) -> Path:
    """An argument that names a place on disk."""
    from moe_fair.core.quote import quote

    if not isinstance(value, (str, PathLike)) or not str(value):
        raise ValueError(f"{name} must be a path, not {quote(value)}")
    return Path(value)


def _loaded(name: str, value: Any, kind: type[T]) -> T:
    """An argument that is an object, or the path of a saved one."""
    import torch

    from moe_fair.core.quote import quote

    if isinstance(value, kind):
        return value
    if not isinstance(value, (str, PathLike)):
        raise ValueError(
            f"{name} must be a {kind.__name__} or the path of a saved one, not {quote(value)}"
        )
    with torch.inference_mode(False):  # tensors that may be changed, whatever the caller's mode
        return kind.load(Path(value))  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moe_fair' has no attribute {name!r}")
