"""What can be refused at once: before the model is opened, and transformers imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_fair.core.made_files import find_plan, find_statistics
from moe_fair.core.plan_parts import Target
from moe_fair.core.recipe import Recipe, parse_size
from moe_fair.moe.folder_kind import check_folder, local_folder


def given_model(recipe: Recipe) -> str:
    """The model that a recipe names.

    Raises:
        ValueError: it names none.
    """
    if recipe.model is None:
        raise ValueError("no model given: name a local directory or a Hub id")
    return recipe.model


def target(recipe: Recipe) -> Target:
    """The recipe's one target.

    Raises:
        ValueError: it names none or several, or one that cannot be.
    """
    size = dict([parse_size(recipe.size)]) if recipe.size else {}
    return Target(
        mean_kept=recipe.experts,
        total=recipe.total,
        ratio=recipe.ratio,
        tolerance=recipe.tolerance,
        **size,
    )


def check_model_folder(recipe: Recipe) -> None:
    """A model that is a directory may be one; what is on the Hub is not asked for here.

    Raises:
        ValueError: it is no model's directory, or none is named.
    """
    check_local(given_model(recipe))


def check_local(model: str) -> None:
    """The same of a model by its name.

    Raises:
        ValueError: it is a directory, and no model's; or a path, and not there.
    """
    folder = local_folder(model)
    try:
        if folder is not None:
            check_folder(folder)
    except ValueError as e:
        raise ValueError(f"{model}: {e}") from e


def check_made(recipe: Recipe) -> None:
    """The files of an earlier stage that a recipe names are there.

    Raises:
        ValueError: one is not.
    """
    if recipe.stats is not None:
        find_statistics(Path(recipe.stats))
    if recipe.plan is not None:
        find_plan(Path(recipe.plan))


def check_texts(texts: Sequence[str]) -> None:
    """What of these can only be a path is there.

    Args:
        texts: sources as they are written; those that the run reads in any case.

    Raises:
        ValueError: one is not there, or is written in no such way.
    """
    from moe_fair.moe.text_sources import check_there, parse_source

    for text in texts:
        check_there(parse_source(text))


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
