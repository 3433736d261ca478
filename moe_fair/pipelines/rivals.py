"""A recipe with other methods: those whose plans are tried against its own."""

from __future__ import annotations

from moe_fair.core.engine_facts import equal_only
from moe_fair.core.method import parse_method
from moe_fair.core.recipe import Recipe

# few: among many plans the luckiest wins (eval/LAB.md)
RIVALS = ("consensus/global", "reconstruction/global", "reconstruction/tod", "fair")
ALIKE = ("consensus/uniform", "reconstruction/uniform", "mone/uniform", "reap/uniform")


def rivals(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> recipe of each method that is tried against the recipe's own."""
    names: tuple[str, ...] = ()
    if recipe.rivals is not None:
        names = () if recipe.rivals == ("none",) else recipe.rivals
    elif chooses_itself(recipe):
        names = ALIKE if equal_only(recipe.serve or ()) else RIVALS
    why = "the result's repair is that of --repair; name none here"
    return {name: with_method(recipe, name, "--rivals", why) for name in names}


def with_method(recipe: Recipe, name: str, option: str, no_repair: str) -> Recipe:
    """The recipe with another method, of the grammar of --method without a repair.

    Args:
        option: where it was given, and `no_repair` why it has no repair there, for the errors.

    Raises:
        ValueError: it has another form, or a repair.
    """
    parts = parse_method(name, option)
    if "repair" in parts:
        raise ValueError(f"{option} {name}: {no_repair}")
    clear = dict.fromkeys(("removal", "protection", "allocate"))
    return recipe.with_settings({**clear, **parts, "rivals": ("none",)})


def chooses_itself(recipe: Recipe) -> bool:
    """The command was left to choose by itself."""
    given = (
        recipe.method, recipe.removal, recipe.protection, recipe.allocate, recipe.tolerance,
        recipe.for_,
    )  # fmt: skip
    alike = recipe.reduce == "prune" and recipe.taylor is not False
    return alike and all(x is None for x in given)
