"""What a setting may be, where a registry of rules says so: names and what each is in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def _line(rule: Any) -> str:
    """The first line of a rule's docstring, without the shape before it."""
    text = (rule.__doc__ or "").strip().partition("\n")[0]
    return text.removeprefix("[N] ").removeprefix("[E] ").removesuffix(".").removesuffix(":")
