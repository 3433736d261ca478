"""What can be refused at once: before the model is opened, and transformers imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_fair.core.made_files import find_plan, find_statistics
from moe_fair.core.plan_parts import Target
from moe_fair.core.recipe import Recipe
from moe_fair.core.sizes import parse_size
from moe_fair.moe.folder_kind import check_folder, local_folder


def given_model(model: str | None) -> str:
    """The model that a recipe names.

    Raises:
        ValueError: it names none.
    """
    if model is None:
        raise ValueError("no model given: name a local directory or a Hub id")
    return model


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


def check_model_folder(model: str | None) -> None:
    """A model that is a directory may be one; what is on the Hub is not asked for here.

    Raises:
        ValueError: it is no model's directory, or none is named.
    """
    check_local(given_model(model))


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


def check_made(stats: str | None, plan: str | None) -> None:
    """The files of an earlier stage that are named are there.

    Raises:
        ValueError: one is not.
    """
    if stats is not None:
        find_statistics(Path(stats))
    if plan is not None:
        find_plan(Path(plan))


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
