"""What a result is called where nobody has named it: model and target, in the current directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fair.core.recipe import TARGETS, Recipe
from moe_fair.core.settings import flag
from moe_fair.pipelines.early_checks import given_model

LONGEST = 80  # characters of a model's name
# what a plan calls its target -> what comes behind the model's name
PLANNED = {
    "mean_kept": "{:g}-experts", "total": "total-{}", "ratio": "ratio-{:g}",
    "parameters": "size-{}-parameters", "bytes": "size-{}-bytes", "tolerance": "tolerance-{:g}",
}  # fmt: skip


def pruned_output(recipe: Recipe, target: Mapping[str, Any] | None = None) -> Path:
    """`Qwen1.5-MoE-A2.7B-Chat-40-experts`: of `prune`.

    Args:
        target: of a plan that was made before.

    Raises:
        ValueError: no model, or no target.
    """
    ends = [form.format(target[n]) for n, form in PLANNED.items() if n in target] if target else []
    if recipe.experts is not None:
        ends = [f"{recipe.experts:g}-experts"]
    for name in TARGETS[1:]:
        value = getattr(recipe, name)
        if value is not None:
            ends = [
                f"{name}-{value:g}"
                if isinstance(value, float)
                else f"{name}-{value}".replace(" ", "")
            ]
    if not ends:
        raise ValueError(f"give exactly one target ({', '.join(map(flag, TARGETS))}); got nothing")
    return Path(f"{model_name(recipe)}-{plain(ends[0])}")


def statistics_output(recipe: Recipe) -> Path:
    """`Qwen1.5-MoE-A2.7B-Chat-statistics`: of `calibrate`."""
    return Path(f"{model_name(recipe)}-statistics")


def model_name(recipe: Recipe) -> str:
    """The last part of a model's path or Hub id, as a plain file name.

    Raises:
        ValueError: no model.
    """
    model = given_model(recipe.model)
    last = Path(model).name
    if last in ("", ".."):  # the directory that we are in, or one above
        last = Path(model).resolve().name
    return plain(last)[:LONGEST] or "model"


def plain(text: str) -> str:
    """Letters, digits, dots, dashes; neither hidden nor an option."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")
