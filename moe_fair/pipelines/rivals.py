"""Which methods' plans are tried against a recipe's own."""

from __future__ import annotations

from moe_fair.core.method import parse_method
from moe_fair.core.recipe import Recipe

RIVALS = (
    "taylor-sq/global", "reap/uniform", "reap/tod", "mone/uniform", "mone/global",
    "frequency/uniform",
)  # fmt: skip


def rivals(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> recipe of each method that is tried against the recipe's own."""
    names: tuple[str, ...] = ()
    if recipe.rivals is not None:
        names = () if recipe.rivals == ("none",) else recipe.rivals
    elif _usual(recipe):
        names = RIVALS
    found = {}
    for name in names:
        parts = parse_method(name, "--rivals")
        if "repair" in parts:
            raise ValueError(f"--rivals {name}: plans are tried before any repair; name none here")
        clear = dict.fromkeys(("removal", "protection", "allocate"))
        found[name] = recipe.with_settings({**clear, **parts, "rivals": ("none",)})
    return found


def _usual(recipe: Recipe) -> bool:
    """The command was left to choose by itself."""
    given = (
        recipe.method, recipe.removal, recipe.protection, recipe.allocate, recipe.tolerance,
        recipe.for_,
    )  # fmt: skip
    alike = recipe.reduce == "prune" and recipe.taylor is not False
    return alike and all(x is None for x in given)
