"""What can be refused at once: before the model is opened, and transformers imported for it."""

from __future__ import annotations

from moe_fair.core.recipe import Recipe
from moe_fair.moe.folder_kind import check_folder, local_folder


def given_model(recipe: Recipe) -> str:
    """The model that a recipe names.

    Raises:
        ValueError: it names none.
    """
    if recipe.model is None:
        raise ValueError("no model given: name a local directory or a Hub id")
    return recipe.model


def check_model_folder(recipe: Recipe) -> None:
    """A model that is a directory may be one; what is on the Hub is not asked for here.

    Raises:
        ValueError: it is no model's directory, or none is named.
    """
    model = given_model(recipe)
    folder = local_folder(model)
    try:
        if folder is not None:
            check_folder(folder)
    except ValueError as e:
        raise ValueError(f"{model}: {e}") from e


def check_names(recipe: Recipe, repairs: bool = False) -> None:
    """The rules that a recipe names are there.

    Args:
        repairs: the repair's name counts as well.

    Raises:
        ValueError: one is not; names the nearest.
    """
    from moe_fair.moe.criteria import criterion  # all of these import torch
    from moe_fair.moe.repairs import repair
    from moe_fair.pipelines.checks import method

    method(recipe)
    if recipe.curves is not None:
        criterion(recipe.curves)
    wanted = recipe.parts["repair"]
    if repairs and wanted not in (None, "none"):
        repair(wanted)
