"""What a setting may be, where a registry of rules says so: names and what each is in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moe_fair.core.recipe import Recipe
from moe_fair.core.registry import declared, pick
from moe_fair.core.settings import About

METHODS = {
    "second-order": "counterfactual-agreed with one threshold over all layers (this project)",
    "fair": "routed-mass against taylor, by tod (FAIR-Pruner, arXiv 2508.02291)",
    "fair-u": "u-score between calibration domains against taylor, by tod (FAIR-Pruner)",
}


def choices(about: About) -> dict[str, str] | None:
    """Value -> what it is in one line, empty where there is no more to say; None: no fixed choices.

    Imports every rule, those of other packages too.
    """
    if about.choices is None:
        return None
    if isinstance(about.choices, tuple):
        return dict.fromkeys(about.choices, "")
    from moe_fair.core.allocate import allocators  # all of these import torch
    from moe_fair.moe.criteria import criteria
    from moe_fair.moe.repairs import repairs

    scores = {n: f"{_line(c.score)} ({c.source})" for n, c in criteria().items()}
    registries: dict[str, Mapping[str, str]] = {
        "criteria": scores,
        "methods": {**METHODS, **scores},
        "allocators": {n: _line(m) for n, m in allocators().items()},
        "repairs": {"none": "", **{n: _line(m) for n, m in repairs().items()}},
    }
    return dict(registries[about.choices])


RULES = {  # the folder, the entry points of other packages, and what each file makes
    "criterion": ("moe_fair.moe.criteria", "moe_fair.criteria", "Criterion"),
    "allocator": ("moe_fair.core.allocate", "moe_fair.allocators", None),
    "repair": ("moe_fair.moe.repairs", "moe_fair.repairs", None),
}


def check_spelling(recipe: Recipe) -> None:
    """The rules that a recipe names are among those here: said before torch is imported.

    Where other packages bring rules `methods.check_names` is the first to know.

    Raises:
        ValueError: one is not; names the nearest.
    """
    parts = recipe.parts
    _check("criterion", "method", parts["method"], METHODS)
    for name in (parts["removal"], parts["protection"], recipe.curves):
        _check("criterion", "criterion", name)
    _check("allocator", "allocator", parts["allocate"])
    _check("repair", "repair", parts["repair"], ("none",))


def _check(kind: str, what: str, name: str | None, besides: Iterable[str] = ()) -> None:
    if name is not None and (names := declared(*RULES[kind])) is not None:
        pick(dict.fromkeys([*besides, *names]), name, what)


def _line(rule: Any) -> str:
    """The first line of a rule's docstring, without the shape before it."""
    text = (rule.__doc__ or "").strip().partition("\n")[0]
    return re.sub(r"^\[[ENU]\] ", "", text).rstrip(".:")
